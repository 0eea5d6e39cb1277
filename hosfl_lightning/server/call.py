"""One attempt of a round: who is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hosfl_lightning.wire import StepRequest


@dataclass(frozen=True)
class Call:
    """A round's sampled clients.

    Args:
        round: Counted from 0.
        clients: Those that are asked, ascending.
        online: All that an update reaches, ascending.
        attempt: How often the round was repeated before.
    """

    round: int
    clients: list[int]
    online: Sequence[int]
    attempt: int = 0

    def to_each(self, step: int = 0, rule: dict[str, Any] | None = None) -> dict[int, StepRequest]:
        """The request that begins the round, or goes on with it, for each of its clients.

        Args:
            step: The local step.
            rule: What the clients' own steps follow, of a method whose clients take some.
        """
        return {k: StepRequest(self.round, k, self.attempt, step, rule or {}) for k in self.clients}


@dataclass(frozen=True)
class Outcome:
    """What a round leaves for the metrics.

    Args:
        loss: The mean training loss, 0-d or a float; None: the clients keep it to themselves.
        num_examples: Of this process's clients, all local steps.
    """

    loss: Any
    num_examples: int
