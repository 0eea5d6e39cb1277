"""What crosses between the server and clients that live in one process, and the ledger of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hosfl_lightning.wire import Message, check_finite, decode, encode, encoded_size

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Sent:
    """One message that crossed: its kind, ``up`` or ``down``, its encoded bytes, how many received it, and the client
    it came from or went to (None: everybody).
    """

    kind: str
    direction: str
    bytes: int
    receivers: int = 1
    client: int | None = None


class Channel:
    """Delivers every message and keeps the ledger of a round.

    Args:
        serialize: Encode and decode each message, as between machines. Without it the message is handed over and only
            its encoded size is computed; the bytes reported are the same.

    Attributes:
        run_id: Of the envelopes, 16 bytes; set when a run begins.
        ledger: What this process has sent since the round began.
        taps: Told of every message that is counted, and its direction.
    """

    def __init__(self, serialize: bool) -> None:
        self.serialize = serialize
        self.run_id = bytes(16)
        self.ledger: list[Sent] = []
        self.taps: list[Callable[[Message, str], None]] = []

    def up(self, message: M) -> M:
        """From one client to the server.

        Raises:
            WireError: What arrived is not a message that may be taken.
        """
        return self._send(message, "up", 1)

    def down(self, message: M, receivers: int = 1) -> M:
        """From the server to ``receivers`` clients, each of which receives its own copy."""
        return self._send(message, "down", receivers)

    def count(self, message: Message, direction: str, length: int, receivers: int = 1) -> None:
        """Put a message of ``length`` bytes into the ledger, and show it to the taps."""
        self.ledger.append(Sent(message.kind, direction, length, receivers, getattr(message, "client", None)))
        for tap in self.taps:
            tap(message, direction)

    def clear(self) -> None:
        """Forget the ledger: a new round begins."""
        self.ledger.clear()

    def _send(self, message: M, direction: str, receivers: int) -> M:
        if not self.serialize:
            self.count(message, direction, encoded_size(message), receivers)
            check_finite(message)  # as `decode` does: one NaN in a joint batch would be everybody's
            return message
        frame = encode(message, self.run_id)
        self.count(message, direction, len(frame), receivers)
        client = getattr(message, "client", None)
        return decode(frame, message.kind, run_id=self.run_id, round=message.round, client=client)  # type: ignore[return-value]
