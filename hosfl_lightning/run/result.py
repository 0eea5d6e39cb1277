"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One validation: its metrics, and the loss of each batch, so that two runs can be compared in pairs."""

    metrics: dict[str, float]
    batch_losses: list[float]
    round: int = 0

    @property
    def loss(self) -> float:
        """Mean validation loss."""
        return self.metrics["val/loss"]


@dataclass
class RunResult:
    """One run: the validations before the first and after the last round, and the seconds of each round.

    A control also has its ``costs``, as `run.costs.client_costs` measures them.
    """

    first: Evaluation
    last: Evaluation
    seconds: list[float] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)
