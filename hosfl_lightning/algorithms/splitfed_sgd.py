"""The upper control: the client backpropagates, gradients are averaged every step."""

from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.clients import FirstOrderClient, SplitClient
from hosfl_lightning.optim import Basis, Dense, UpdateRule, ZerothOrder
from hosfl_lightning.servers import SplitModule


class SplitFedSGD(SplitRound):
    """The same rounds with each client's exact gradient, averaged every step: ``θ_c ← rule(θ_c, Σ_k w_k g_k)``.

    Args:
        client_optimizer: As in `Algorithm`.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `Algorithm`.
        checkpointing: Clients keep each layer's input instead of its graph and run it twice.

    Reference: SplitFed, arXiv 2004.12088, gradients instead of weights averaged.
    """

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(client_optimizer, client_scheduler, aggregation)
        self.checkpointing = checkpointing

    def make_client(self, module: SplitModule, seed: int) -> SplitClient:
        """A `FirstOrderClient`."""
        optimizer = ZerothOrder(module.client_parameters.items(), self.client_optimizer)
        return FirstOrderClient(module.client_half, optimizer, self.checkpointing)

    def basis(self, round: int) -> Basis:
        """The dense gradient."""
        return Dense([p.numel() for p in self.client.optimizer.parameters])
