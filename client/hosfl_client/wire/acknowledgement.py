"""A client has moved on its own: all that it says of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts
from hosfl_client.wire.errors import FieldError


@dataclass(frozen=True, eq=False)
class Acknowledgement:
    """Client k to server: λ_k has arrived, and what I train is mine alone; nothing of my step travels.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        attempt: How often the round was repeated before, >= 0.
        moved: Whether there is a step that may count; not where its estimate is no finite number.
    """

    kind: ClassVar[str] = "acknowledgement"
    round: int
    client: int
    attempt: int = 0
    moved: bool = True

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        if not isinstance(self.moved, bool):
            raise FieldError(f"{self.kind}: moved must be a bool, got {self.moved!r:.80}")
