"""The messages of a round whose labels stay with the clients, where the model is cut twice.

None of them holds ids, labels, or anything from which the label of a token follows by arithmetic alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts, check_loss, check_tensor
from hosfl_client.wire.coded import Z
from hosfl_client.wire.errors import FieldError, ShapeError

MIDDLE, OUTPUT_MULTIPLIER = 0xFFFE, 0xFFFD
"""Indices in the stream of the rounding, beside those of `hosfl_client.wire.coded`."""
M = TypeVar("M", bound="OfTokens")


class Rows(NamedTuple):
    """What an engine makes of the valid tokens of a tensor (B, S, h).

    Attributes:
        pack: Their rows, coded.
        unpack: (B, S, h) again, with zeros at padding.
        stream: Of the noise of what client k sends or is sent in a step of a round.
    """

    pack: Callable[..., Any]
    unpack: Callable[..., Any]
    stream: Callable[..., Any]


class OfTokens:
    """A message that holds a tensor of one client's valid tokens, (n, h), coded."""

    kind: ClassVar[str]
    #: The field that holds it, and its index in the stream of the rounding.
    held: ClassVar[str]
    index: ClassVar[int]
    #: The engine's.
    rows: ClassVar[Rows]
    round: int
    client: int

    @classmethod
    def pack(
        cls: type[M],
        round: int,
        client: int,
        x: Any,
        mask: Any,
        *,
        codec: str = "fp32",
        seed: int = 0,
        step: int = 0,
        attempt: int = 0,
        **fields: Any,
    ) -> M:
        """Drops the padding of ``x`` (B, S, h) by ``mask`` (B, S) bool, and codes it; ``fields`` are the others.

        Raises:
            FieldError: Shapes that do not fit, a mask that is not bool, an unknown codec, or a local step out of range.
        """
        stream = cls.rows.stream(cls.kind, seed, round, client, step)
        coded = cls.rows.pack(cls.kind, cls.held, x, mask, codec, stream, cls.index)
        held = cls._fields(coded, mask) | {"attempt": attempt, "step": step}
        return cls(round=round, client=client, **held, **fields)  # type: ignore[call-arg]

    @classmethod
    def _fields(cls, coded: Any, mask: Any) -> dict[str, Any]:
        """Those that hold what is packed."""
        return {cls.held: coded}

    def unpack(self, mask: Any) -> Any:
        """The tensor as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than there are rows.
        """
        return self.rows.unpack(self.kind, getattr(self, self.held), mask)

    def unpacked_bytes(self) -> int:
        """Memory of it without its padding, which is the receiver's own."""
        return int(getattr(self, self.held).restored_bytes())

    def _check(self, attempt: int, step: int) -> None:
        check_counts(self.kind, round=self.round, client=self.client, attempt=attempt, step=step)
        getattr(self, self.held).check(self.kind, self.held)


@dataclass(frozen=True, eq=False)
class UnlabelledDataFields(OfTokens):
    """Client k to server: the activations at the first cut, and how many loss terms are behind them.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        z: z₁ of the valid tokens, (n, h), coded.
        mask: Valid tokens, (B, S) bool with n of them True.
        num_terms: n_k, from which the server makes w_k; at most n.
        attempt: How often the round was repeated before, >= 0.
        step: The client's local step within the round, >= 0.
    """

    kind: ClassVar[str] = "unlabelled_data"
    held, index = "z", Z
    round: int
    client: int
    z: Any
    mask: Any
    num_terms: int
    attempt: int = 0
    step: int = 0

    @classmethod
    def _fields(cls, coded: Any, mask: Any) -> dict[str, Any]:
        return {"z": coded, "mask": mask}

    def unpacked_bytes(self) -> int:
        """Memory of z and the mask, padding included."""
        return math.prod(self.mask.shape) * (int(self.z.row_bytes()) + 1)

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        self._check(self.attempt, self.step)
        check_counts(self.kind, num_terms=self.num_terms)
        check_tensor(arrays, self.kind, "mask", self.mask, 2, ("BOOL",))
        rows, valid = len(self.z.values), int(self.mask.sum())
        if rows != valid:
            raise ShapeError(f"{self.kind}: z has {rows} rows, the mask {valid} valid tokens")
        if self.num_terms > valid:
            raise FieldError(f"{self.kind}: num_terms is {self.num_terms}, of {valid} valid tokens")


@dataclass(frozen=True, eq=False)
class MiddleOutputFields(OfTokens):
    """Server to client k: z₂ = f_s(z₁; θ_s), what the head takes, at the valid tokens.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        z: z₂, (n, h), coded; it comes back in the dtype it had.
        attempt: How often the round was repeated before, >= 0.
        step: That of z₁, >= 0.
    """

    kind: ClassVar[str] = "middle_output"
    held, index = "z", MIDDLE
    round: int
    client: int
    z: Any
    attempt: int = 0
    step: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        self._check(self.attempt, self.step)


@dataclass(frozen=True, eq=False)
class OutputMultiplierFields(OfTokens):
    """Client k to server: λ₂ = ∂ℓ_k/∂z₂ at the valid tokens, not weighted by w_k.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        multiplier: λ₂, (n, h), coded; it comes back in the dtype it had.
        loss: ℓ_k, nats; None where the client keeps it to itself.
        attempt: How often the round was repeated before, >= 0.
        step: That of z₂, >= 0.
    """

    kind: ClassVar[str] = "output_multiplier"
    held, index = "multiplier", OUTPUT_MULTIPLIER
    round: int
    client: int
    multiplier: Any
    loss: float | None = None
    attempt: int = 0
    step: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        self._check(self.attempt, self.step)
        check_loss(self.kind, self.loss)
