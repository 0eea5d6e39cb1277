"""The control that does nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hosfl_lightning.clients.base import Anchor, Batch, Client, freeze
from hosfl_lightning.optim import Basis, ZerothOrder


class FrozenClient(Client):
    """``θ_c`` stays where it started: what the server reaches alone.

    Args:
        half: ``f_c``.
        optimizer: Holds θ_c and is never stepped.
    """

    def __init__(self, half: nn.Module, optimizer: ZerothOrder) -> None:
        super().__init__(half, optimizer)
        freeze(half)

    @torch.no_grad()
    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """``z = f_c(x; θ_c)``, no graph."""
        return Anchor(self._evaluate(batch))

    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """Nothing: ``(K, 0)``."""
        return torch.zeros(len(rows), 0)

    def apply(self, coefficients: Tensor, basis: Basis) -> None:
        """Nothing."""
