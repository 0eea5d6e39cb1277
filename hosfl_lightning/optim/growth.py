"""Has a half run away? How far it is from the size that it had, and whether its probes still tell anything."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

#: Beyond this no training has taken a half; below it a rate may still be a good one.
RUNAWAY = 100.0
#: Steps in a row without a single scalar that is not 0, before a half that has hardly grown is told of.
IN_A_ROW = 3


class Growth:
    r"""``‖θ‖ / max(‖θ_0‖, 1)``, of tensors as they are and as they were when this was made.

    Args:
        tensors: θ.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.start = max(self._norm(), 1.0)

    def now(self) -> float:
        """The growth; inf where θ is not finite."""
        grown = self._norm() / self.start
        return grown if grown == grown else float("inf")

    @torch.no_grad()
    def _norm(self) -> float:
        norms = [tensor.norm().float() for tensor in self.tensors]
        return float(torch.stack(norms).norm()) if norms else 0.0


class SilentProbes:
    """Warns once when the scalars of a step are all exactly 0, as they are when θ is so large that ``μ u`` is lost.

    Args:
        growth: Of θ.
        name: Of the part, for the warning.
        rate: The setting of its learning rate.
    """

    def __init__(self, growth: Growth, name: str, rate: str) -> None:
        self.growth, self.name, self.rate = growth, name, rate
        self._silent, self._told, self._spoke = 0, False, False

    def saw(self, coefficients: Tensor, step: int) -> None:
        """The scalars of a step, on a device that one may wait for."""
        self._silent = 0 if bool(coefficients.any()) else self._silent + 1
        self._spoke |= not self._silent  # else μ is too small from the start, which others look at
        if self._told or not self._silent:
            return
        grown = self.growth.now()
        if grown >= RUNAWAY:
            why = f"{self.name} has grown {grown:.0e}-fold since the start, it has diverged; lower {self.rate}"
        elif self._spoke and self._silent >= IN_A_ROW:
            why = f"{self.name} has stopped to learn; lower {self.rate}, or raise mu"
        else:
            return
        rank_zero_warn(f"step {step}: all projected gradients are exactly 0: {why}")
        self._told = True
