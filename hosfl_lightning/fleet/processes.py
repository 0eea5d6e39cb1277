"""The processes in which the server's part of a run takes place: here there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from hosfl_lightning.fleet.sums import LocalSums
from hosfl_lightning.wire import Message

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Processes:
    """What processes that share the clients of a round tell each other. All of them must call these."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the server."""
        return True

    def own(self, clients: Sequence[T]) -> list[T]:
        """Those of a round's clients, which are in ascending order, that this process runs."""
        return list(clients)

    def share(self, value: T) -> list[T]:
        """What every process says here, in their order; plain values: numbers, text, None, and lists of them."""
        return [value]

    def say(self, frame: bytes) -> bytes:
        """What the first process has to say."""
        return frame

    def collect(self, answers: list[M]) -> list[M]:
        """The answers of all processes, in any order."""
        return answers

    def sums(self, parameters: list[nn.Parameter]) -> LocalSums:
        """The sums of one round's backward passes."""
        return LocalSums(parameters)

    def count(self, value: int) -> int:
        """A count summed over all processes."""
        return sum(self.share(value))

    def in_client_order(self, rows: list[list[float]]) -> list[list[float]]:
        """The rows of all processes; a row begins with its client."""
        return sorted((row for part in self.share(rows) for row in part), key=lambda row: row[0])

    def wait(self) -> None:
        """Until every process is here."""
        self.share(None)
