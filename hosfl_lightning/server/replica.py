"""The server's copy of what its clients train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hosfl_lightning.clients import vectors
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.wire import Weights


@dataclass(frozen=True)
class Replica:
    """For validation, export and snapshots; moved by the same updates as everybody's.

    In a simulation the clients that are up to date, which are bit-identical, and this are one.

    Args:
        trained: The tensors by name, in manifest order.
        optimizer: Their rule, its moments and its schedule's learning rate.
    """

    trained: Mapping[str, nn.Parameter]
    optimizer: ZerothOrder

    def vector(self) -> Tensor:
        """All tensors one after the other, ``(d,)`` fp32 on the host."""
        return vectors.flat(self.trained.values())

    def load(self, vector: Tensor) -> None:
        """Put a `vector` in the place of what is trained."""
        vectors.load(vector, self.trained)

    def message(self, vector: Tensor, round: int, client: int, attempt: int) -> Weights:
        """A `vector` to a client, with the rule of its steps."""
        rule = self.optimizer.prescription
        return vectors.message(self.trained, vector, round, client, attempt=attempt, rule=rule)

    def content(self, weights: Weights) -> Tensor:
        """The `vector` of a client's message.

        Raises:
            KeyError: A tensor is missing.
        """
        return vectors.content(weights, self.trained)

    def objection(self, weights: Weights) -> str | None:
        """Why a client's message is not of these tensors, in words; None: it is."""
        for name, mine in self.trained.items():
            theirs: Any = weights.tensors.get(name)
            if theirs is None or theirs.shape != mine.shape:
                shape = None if theirs is None else [*theirs.shape]
                return f"its weights have {name} of shape {shape}, the run's is {[*mine.shape]}"
        return None
