"""The upper control: the client backpropagates, gradients are averaged every step."""

from __future__ import annotations

from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.clients import Client, FirstOrderClient
from hosfl_lightning.optim import Basis, Dense, ZerothOrder
from hosfl_lightning.servers import SplitModule


class SplitFedSGD(Algorithm):
    """The same rounds with each client's exact gradient, averaged every step: ``θ_c ← rule(θ_c, Σ_k w_k g_k)``.

    Reference: SplitFed, arXiv 2004.12088, gradients instead of weights averaged.
    """

    def make_client(self, module: SplitModule, seed: int) -> Client:
        """A `FirstOrderClient`."""
        return FirstOrderClient(
            module.client_half, ZerothOrder(module.client_parameters.items(), self.client_optimizer)
        )

    def basis(self, round: int) -> Basis:
        """The dense gradient."""
        return Dense([p.numel() for p in self.client.optimizer.parameters])
