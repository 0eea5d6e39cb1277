"""What one client was asked in an attempt of a round, and how far it has answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hosfl_lightning.wire import Message, checksum


@dataclass
class Exchange:
    """One request, and what was answered to it.

    Attributes:
        request: What was asked.
        frame: As it was sent.
        expected: The kinds that an answer may have.
        digest: The answer's `checksum`; None: there is none yet.
    """

    request: Any
    frame: bytes
    expected: Sequence[type[Message]]
    digest: bytes | None = None


@dataclass
class Conversation:
    """The exchanges of one client, in their order.

    A client whose connection was cut is asked for what it has not answered. One that has forgotten what it was asked is
    asked everything again, and must answer as before: λ is of the z that it has sent.

    Attributes:
        exchanges: Since the attempt began.
        answered: How many of them the present connection has answered.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    answered: int = 0

    def ask(self, exchange: Exchange) -> None:
        """One more request."""
        self.exchanges.append(exchange)

    def again(self, forgotten: bool) -> list[bytes]:
        """The requests to be sent on a new connection.

        Args:
            forgotten: Whether another process than before is at the other end.
        """
        if forgotten:
            self.answered = 0
        return [exchange.frame for exchange in self.exchanges[self.answered :]]

    @property
    def awaited(self) -> Exchange | None:
        """What the next answer is to."""
        return self.exchanges[self.answered] if self.answered < len(self.exchanges) else None

    def knows(self, frame: bytes) -> bool:
        """Whether this very answer, which is verified, was received before, on the present connection."""
        return checksum(frame) in {exchange.digest for exchange in self.exchanges[: self.answered]}
