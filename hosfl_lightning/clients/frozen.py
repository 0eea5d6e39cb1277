"""The control that does nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from hosfl_lightning.clients.base import Anchor
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.optim import Basis
from hosfl_lightning.wire import Update


class FrozenClient(ForwardOnlyClient):
    """``θ_c`` stays where it started: what the server reaches alone. Its forward is the forward-only client's."""

    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """Nothing: ``(K, 0)``."""
        return torch.zeros(len(rows), 0)

    def apply(self, update: Update) -> None:
        """Nothing."""
