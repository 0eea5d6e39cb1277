"""The two messages of a client that comes back after missed rounds: what it holds, and a whole state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hosfl_client.wire.arrays import FLOATS, Arrays
from hosfl_client.wire.checks import check_counts, check_named_tensors, check_strings


@dataclass(frozen=True, eq=False)
class CatchUpRequest:
    """Client k to server: I hold θ_c after ``version`` updates of this incarnation; send me what I missed.

    Attributes:
        round: Round in which the client is back, >= 0.
        client: Client number k, >= 0.
        version: Number of updates that the client's state contains.
        incarnation: Which server, on which hardware, made the last of them.
        digest: Of the state, where it has to be shown; empty: the
            client holds none.
        held_out: Batches of validation data that are the client's own.
    """

    kind: ClassVar[str] = "catch_up_request"
    round: int
    client: int
    version: int
    incarnation: str
    digest: str = ""
    held_out: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, version=self.version, held_out=self.held_out)
        check_strings(self.kind, incarnation=self.incarnation, digest=self.digest)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Server to client k: the whole state of the client half, in place of the updates it missed.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        version: Number of updates that the state contains.
        incarnation: Which server, on which hardware, made it.
        reason: Why a snapshot and not the updates, for people.
        step: The rule's step count, >= 0.
        tensors: Trained tensors and optimizer moments by name; any floating dtype, any shape, bit for bit.
    """

    kind: ClassVar[str] = "snapshot"
    round: int
    client: int
    version: int
    incarnation: str
    reason: str
    step: int
    tensors: dict[str, Any]

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types and dtypes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, version=self.version, step=self.step)
        check_strings(self.kind, incarnation=self.incarnation, reason=self.reason)
        check_named_tensors(arrays, self.kind, "tensors", self.tensors, FLOATS)
