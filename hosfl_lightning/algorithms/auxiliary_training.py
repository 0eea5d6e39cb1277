"""Methods whose clients have an auxiliary head, and with it a loss of their own."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor, nn

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.base import Runner
from hosfl_lightning.algorithms.crossing import download, upload
from hosfl_lightning.algorithms.local_training import LocalTraining
from hosfl_lightning.clients import AuxiliaryClient, AuxiliaryHalf, Cohort
from hosfl_lightning.optim import UpdateRule, ZerothOrder
from hosfl_lightning.servers import SplitModule


class AuxiliaryTraining(LocalTraining):
    r"""``θ = (θ_c, θ_a)`` descends ``F(θ) = ℓ(f_a(f_c(x; θ_c); θ_a), y)`` at the clients; the server trains on their z.

    ::

        client k, step e   z = f_c(x; θ_c);   θ_k ← rule(θ_k, an estimate of ∇F)
        every k-th step    z goes up;  θ_s ← rule(θ_s, ∂ℓ(f_s(z; θ_s), y)/∂θ_s), one client after the other
        all                θ ← θ + Σ_k w_k (θ_k − θ)

    Steps are counted over the rounds, and the first is one at which z goes up. No λ comes back. The training loss that
    is logged is the clients' F. The head is one linear layer on the pooled z for images; for language it is the
    server's first blocks, its norm and its unembedding, as they are when the run begins.

    Args:
        client_optimizer: As in `Algorithm`.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `LocalTraining`.
        local_steps: As in `LocalTraining`.
        checkpointing: As in `LocalTraining`.
        upload_every: ``k``.
        auxiliary_blocks: Server blocks in the head, 0 .. all that it holds.

    Raises:
        ValueError: For a setting out of range.
    """

    client: AuxiliaryClient

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
        local_steps: int = 1,
        checkpointing: bool = False,
        upload_every: int = 1,
        auxiliary_blocks: int = 0,
    ) -> None:
        super().__init__(client_optimizer, client_scheduler, aggregation, local_steps, checkpointing)
        if upload_every < 1:
            raise ValueError(f"trainer.algorithm: upload_every must be >= 1, got {upload_every}")
        self.upload_every, self.auxiliary_blocks = upload_every, auxiliary_blocks
        self._head: tuple[SplitModule, nn.Module, dict[str, nn.Parameter]] | None = None

    def check(self, module: SplitModule) -> None:
        """As in `Algorithm`, and the model has such a head."""
        super().check(module)
        self.head(module)

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """As in `Algorithm`; the head starts anew."""
        self._head = None
        super().setup(module, seed, callbacks)

    def parameters(self, module: SplitModule) -> dict[str, nn.Parameter]:
        """θ_c, then θ_a under ``auxiliary.``."""
        return {**module.client_parameters, **self.head(module)[1]}

    def head(self, module: SplitModule) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The run's head, and what is trained of it."""
        if self._head is None or self._head[0] is not module:
            head = module.auxiliary_head(self.auxiliary_blocks)
            trained = {f"auxiliary.{name}": p for name, p in head.named_parameters() if p.requires_grad}
            self._head = module, head, trained
        return self._head[1:]

    def make_client(self, module: SplitModule, seed: int) -> AuxiliaryClient:
        """An `AuxiliaryClient`."""
        half = AuxiliaryHalf(module.client_half, self.head(module)[0])
        optimizer = ZerothOrder(self.parameters(module).items(), self.client_optimizer)
        return AuxiliaryClient(half, optimizer, module.loss, checkpointing=self.checkpointing)

    def due(self, round: int, step: int) -> bool:
        """Whether z goes up at that local step."""
        return (round * self.local_steps + step) % self.upload_every == 0

    def answered(self, round: int, step: int) -> bool:
        """Whether λ comes down for it."""
        return False

    def exchange(self, runner: Runner, round: int, step: int, cohort: Cohort, z: Tensor) -> list[Tensor] | None:
        """The server's step on z, where it goes up.

        Returns:
            λ ``(B, S, h)`` where it comes down, else nothing; None: the server refused the client.
        """
        if not self.due(round, step):
            return []
        inbox = upload(runner, round, cohort, z, step)
        if not inbox:
            return None
        _, [multipliers] = runner.server.backward([inbox], step)
        runner.server.step()
        return [download(runner, cohort, z, inbox, multipliers)] if self.answered(round, step) else []

    def settings(self) -> dict[str, Any]:
        """As in `LocalTraining`, and the head's."""
        return {
            **super().settings(), "upload_every": self.upload_every, "auxiliary_blocks": self.auxiliary_blocks,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """As in `LocalTraining`, and θ_a."""
        held = {name: p.detach().clone() for name, p in self.trained.items() if name.startswith("auxiliary.")}
        return {**super().state_dict(), "auxiliary": held}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict(state)
        for name, tensor in state["auxiliary"].items():
            self.trained[name].copy_(tensor)
