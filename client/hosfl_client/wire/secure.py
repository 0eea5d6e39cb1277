"""The messages of a secure sum, in the place of what is summed: no single answer is in any of them.

client k -> server   SecureKeys        it has an answer, n_k, and its public keys of this attempt
server -> client k   SecurePeers       the keys of all who sent some, and how many shares open a secret
client k -> server   SecureShares      a share of its two secrets for each other, sealed
server -> client k   SecureShares      those that the others have sealed for k
client k -> server   MaskedGradients   n_k v_k in fixed point under its masks
server -> client k   UnmaskRequest     whose masked answers are in the sum
client k -> server   SecureShares      of self-mask seeds of those, of mask keys of the others, open
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts, check_settings, check_strings, check_tensor
from hosfl_client.wire.errors import FieldError, ShapeError


@dataclass(frozen=True, eq=False)
class SecureKeys:
    """Client k to server, in the place of its answer to λ, which it keeps.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        basis: In what its answer is expressed.
        keys: Its two public keys, one behind the other, uint8 (64,).
        num_terms: n_k.
        attempt: How often the round was repeated before, >= 0.
        reason: Why its answer cannot be summed, for people; empty: it can.
    """

    kind: ClassVar[str] = "secure_keys"
    round: int
    client: int
    basis: dict[str, Any]
    keys: Any
    num_terms: int
    attempt: int = 0
    reason: str = ""

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        counts = {"num_terms": self.num_terms, "attempt": self.attempt}
        check_counts(self.kind, round=self.round, client=self.client, **counts)
        check_settings(self.kind, "basis", self.basis)
        check_tensor(arrays, self.kind, "keys", self.keys, 1, ("U8",))
        check_strings(self.kind, reason=self.reason)


@dataclass(frozen=True, eq=False)
class SecurePeers:
    """Server to client k: who takes part.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        peers: All of them, ascending; k is one.
        keys: Their public keys, a row each, uint8 (K, 64).
        threshold: Shares that open a secret.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "secure_peers"
    round: int
    client: int
    peers: list[int]
    keys: Any
    threshold: int
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        counts = {"threshold": self.threshold, "attempt": self.attempt}
        check_counts(self.kind, round=self.round, client=self.client, **counts)
        _check_rows(arrays, self.kind, self.peers, "keys", self.keys)


@dataclass(frozen=True, eq=False)
class SecureShares:
    """Either way: a share for each of these clients, from each of them, or of each of them; see above.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0, who sends or receives.
        peers: The others, ascending.
        shares: A row each, uint8.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "secure_shares"
    round: int
    client: int
    peers: list[int]
    shares: Any
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        _check_rows(arrays, self.kind, self.peers, "shares", self.shares)


@dataclass(frozen=True, eq=False)
class MaskedGradients:
    """Client k to server: n_k v_k under masks that vanish in the sum.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        masked: P integers of 64 bits, little-endian, uint8 (8P,).
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "masked_gradients"
    round: int
    client: int
    masked: Any
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        check_tensor(arrays, self.kind, "masked", self.masked, 1, ("U8",))


@dataclass(frozen=True, eq=False)
class UnmaskRequest:
    """Server to client k: these are summed; give what opens the sum, and nothing else.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        survivors: Whose masked answers have come, ascending; k is one.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "unmask_request"
    round: int
    client: int
    survivors: list[int]
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        _check_numbers(self.kind, "survivors", self.survivors)


def _check_numbers(kind: str, name: str, clients: object) -> None:
    if not isinstance(clients, list):
        raise FieldError(f"{kind}: {name} must be a list of client numbers")
    for client in clients:
        check_counts(kind, **{name: client})


def _check_rows(arrays: Arrays, kind: str, peers: object, name: str, rows: Any) -> None:
    _check_numbers(kind, "peers", peers)
    check_tensor(arrays, kind, name, rows, 2, ("U8",))
    assert isinstance(peers, list)
    if arrays.form(rows).shape[0] != len(peers):
        raise ShapeError(f"{kind}: {name} must have {len(peers)} rows, one a peer, got {arrays.form(rows).shape[0]}")
