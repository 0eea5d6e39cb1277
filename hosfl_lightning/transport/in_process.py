"""Messages between clients and a server that live in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from hosfl_lightning.wire import Message, decode, encode, encoded_size

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Sent:
    """One message that crossed: its kind, ``up`` or ``down``, its encoded bytes and how many received it."""

    kind: str
    direction: str
    bytes: int
    receivers: int = 1


class InProcess:
    """Delivers every message and keeps the ledger of a round.

    Args:
        serialize: Encode and decode each message, as a remote client would. Without it the message is handed over and
            only its encoded size is computed; the bytes reported are the same.
    """

    def __init__(self, serialize: bool) -> None:
        self.serialize = serialize
        self.ledger: list[Sent] = []

    def up(self, message: M) -> M:
        """From one client to the server."""
        return self._send(message, "up", 1)

    def down(self, message: M, receivers: int = 1) -> M:
        """From the server to ``receivers`` clients, each of which receives its own copy."""
        return self._send(message, "down", receivers)

    def clear(self) -> None:
        """Forget the ledger: a new round begins."""
        self.ledger.clear()

    def _send(self, message: M, direction: str, receivers: int) -> M:
        if not self.serialize:
            self.ledger.append(Sent(message.kind, direction, encoded_size(message), receivers))
            return message
        data = encode(message)
        self.ledger.append(Sent(message.kind, direction, len(data), receivers))
        return decode(data, message.kind)  # type: ignore[return-value]
