"""Messages between clients and a server that live in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

from torch import nn

from hosfl_lightning.transport.sums import LocalSums
from hosfl_lightning.wire import Message, check_finite, decode, encode, encoded_size

M = TypeVar("M", bound=Message)
T = TypeVar("T")


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


class InProcess:
    """Delivers every message and keeps the ledger of a round.

    Args:
        serialize: Encode and decode each message, as a remote client would. Without it the message is handed over and
            only its encoded size is computed; the bytes reported are the same.

    Attributes:
        run_id: Of the envelopes, 16 bytes; set when a run begins.
        ledger: What this process has sent since the round began.
    """

    def __init__(self, serialize: bool) -> None:
        self.serialize = serialize
        self.run_id = bytes(16)
        self.ledger: list[Sent] = []

    # ---- between a client and the server

    def up(self, message: M) -> M:
        """From one client to the server.

        Raises:
            WireError: What arrived is not a message that may be taken.
        """
        return self._send(message, "up", 1)

    def down(self, message: M, receivers: int = 1) -> M:
        """From the server to ``receivers`` clients, each of which receives its own copy."""
        return self._send(message, "down", receivers)

    def broadcast(self, message: M, receivers: int) -> M:
        """From the server to everybody at once."""
        return self.down(message, receivers)

    def clear(self) -> None:
        """Forget the ledger: a new round begins."""
        self.ledger.clear()

    # ---- between the processes that share the clients of a round: here there is one. All of them must call these.

    def own(self, clients: Sequence[T]) -> list[T]:
        """Those of a round's clients, which are in ascending order, that this process runs."""
        return list(clients)

    def share(self, value: T) -> list[T]:
        """What every process says here, in their order; plain values: numbers, text, None, and lists of them."""
        return [value]

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

    def entries(self) -> list[Sent]:
        """The ledgers of all processes."""
        return [Sent(*entry) for part in self.share([astuple(sent) for sent in self.ledger]) for entry in part]

    def wait(self) -> None:
        """Until every process is here."""
        self.share(None)

    def _send(self, message: M, direction: str, receivers: int) -> M:
        client = getattr(message, "client", None)
        if not self.serialize:
            self.ledger.append(Sent(message.kind, direction, encoded_size(message), receivers, client))
            check_finite(message)  # as `decode` does: one NaN in a joint batch would be everybody's
            return message
        frame = encode(message, self.run_id)
        self.ledger.append(Sent(message.kind, direction, len(frame), receivers, client))
        return decode(frame, message.kind, run_id=self.run_id, round=message.round, client=client)  # type: ignore[return-value]
