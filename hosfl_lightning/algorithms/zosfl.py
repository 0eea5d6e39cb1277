"""ZO-SFL: neither half backpropagates; one direction probes both at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.base import Runner, plain
from hosfl_lightning.algorithms.crossing import conclude, mean_loss, upload
from hosfl_lightning.algorithms.split_round import Visit
from hosfl_lightning.algorithms.two_point import SIDES, TwoPoint
from hosfl_lightning.clients import Anchor, Cohort
from hosfl_lightning.optim import SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import SmashedData


class ZOSFL(TwoPoint):
    r"""Zeroth-order split federated learning, joint two-point: what is left of `HOSFL` when the server has no backprop.

    ::

        u_p = (u_p^c, u_p^s),  one direction of the whole model: the server's tensors are numbered after the client's
        server    ℓ_kp± = ℓ_k(f_s(f_c(x_k; θ_c ± μ u_p^c); θ_s ± μ u_p^s), y_k),  v_kp = (ℓ_kp⁺ − ℓ_kp⁻) / 2μ,  p = 1..P
                  θ_s ← rule(θ_s, (1/P) Σ_p (Σ_k w_k v_kp) u_p^s)
        clients   θ_c ← rule(θ_c, (1/P) Σ_p (Σ_k w_k v_kp) u_p^c)

    ``2P`` forwards of either half, all without dropout, and ``2P`` z go up; z at θ itself is not needed. The labels
    travel with the first. The training loss is the mean of ``ℓ_k`` over both sides of all probes, ``ℓ_k(θ) + O(μ²)``.

    The optimizer, the schedule and the ``gradient_clip_val`` that backprop would need are not used.

    The HO-SFL paper has it as its lower line (LoRA on both halves, P = 2; HO-SFL in brackets): SST-2 52.8 (87.6) with
    OPT-125M, 51.8 (90.8) with Gemma-3-270M, 61.5 (93.9) with LLaMA-3.2-1B; RTE 52.0 (59.2), 54.2 (65.0), 49.1 (73.3).

    Args:
        probes: As in `TwoPoint`.
        mu: As in `TwoPoint`.
        distribution: As in `TwoPoint`.
        client_optimizer: Update rule on θ_c.
        server_optimizer: Update rule on θ_s; None: the clients'.
        client_scheduler: As in `Algorithm`; the server's rate follows a schedule of its own of the same kind.
        aggregation: As in `Algorithm`.

    Reference: ZO-SFL in HO-SFL, arXiv 2603.14773.
    """

    server_order = "zeroth"

    def __init__(
        self,
        probes: int = 2,
        mu: float = 1e-3,
        distribution: str = "rademacher",
        client_optimizer: UpdateRule | None = None,
        server_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
    ) -> None:
        super().__init__(probes, mu, distribution, client_optimizer, client_scheduler, aggregation)
        self.server_optimizer = server_optimizer if server_optimizer is not None else self.client_optimizer
        self.server: ZerothOrder
        self.server_schedule: Any | None = None

    @override
    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        super().setup(module, seed, callbacks)
        self.server = self.zeroth_order(
            module.server_parameters, self.server_optimizer, module.server_half, seed, len(module.client_parameters)
        )
        if self.make_scheduler is not None:
            self.server_schedule = self.make_scheduler(self.server)

    @override
    def settings(self) -> dict[str, Any]:
        rule = {"name": type(self.server_optimizer).__name__, **self.server_optimizer.hyper_parameters()}
        return {**super().settings(), **{f"server_optimizer.{k}": plain(v) for k, v in rule.items()}}

    @override
    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        basis = self.directions(round)
        visits = self.gather(runner, round, cohorts)
        losses = [self.losses(runner, visit, basis) for visit in visits]
        own = [answer for visit, at in zip(visits, losses) if at for answer in self.answers(runner, visit, at, basis)]
        update = conclude(runner, round, basis, own, self.aggregate)
        self.client.apply(update)
        self.server.record(update.coefficients, self.server.basis(round))
        self.server.step()
        self.end_round(runner)
        return mean_loss(runner, update, {k: float(at.mean()) for group in losses for k, at in group.items()})

    @override
    def visit(self, runner: Runner, round: int, cohort: Cohort) -> Visit:
        """Step 2: the first side of the first probe goes up with the labels and the mask."""
        batch, basis = runner.to_device(cohort.batch), self.directions(round)
        with runner.autocast():
            z = self.client.probe(batch, basis, 0, SIDES[0] * self.client.optimizer.mu)
        return Visit(cohort, batch, Anchor(z), upload(runner, round, cohort, z))

    @override
    def probed(
        self,
        runner: Runner,
        visit: Visit,
        inbox: Sequence[SmashedData],
        basis: SharedDirections,
        probe: int,
        side: int,
    ) -> list[SmashedData]:
        if probe == side == 0:
            return list(inbox)
        return super().probed(runner, visit, inbox, basis, probe, side)

    @override
    def server_at(self, basis: SharedDirections, probe: int, scale: float) -> AbstractContextManager[None]:
        """The server's part of the same direction."""
        return self.server.perturbed(self.server.basis(basis.streams[probe].round), probe, scale)

    @override
    def end_round(self, runner: Runner) -> None:
        super().end_round(runner)
        if self.server_schedule is not None:
            self.server_schedule.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        schedule = self.server_schedule.state_dict() if self.server_schedule is not None else None
        return {**super().state_dict(), "server_optimizer": self.server.state_dict(), "server_schedule": schedule}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.server.load_state_dict(state["server_optimizer"])
        if self.server_schedule is not None:
            self.server_schedule.load_state_dict(state["server_schedule"])
