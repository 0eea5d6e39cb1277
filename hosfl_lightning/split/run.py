"""A half on a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def run(half: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The half on what it takes of a batch."""
    names: Any = half.inputs
    return half(*(batch[name] for name in names))
