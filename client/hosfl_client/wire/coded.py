"""The fields and checks of what is coded: a tensor of any engine, and the messages that hold one.

An engine adds to each message how it is packed, and unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from hosfl_client.wire.arrays import FLOATS, WORDS, Arrays
from hosfl_client.wire.checks import check_counts, check_probe, check_settings, check_strings, check_tensor
from hosfl_client.wire.errors import DtypeError, FieldError, ShapeError

ROW = 128
"""Coefficients that share a scale: int8 takes 8.125 bits a coefficient, int4 4.125, ternary 1.75."""
Z, MULTIPLIER, GRADIENT = 0, 1, 0xFFFF
"""Indices in the stream of the rounding; the gradient's is behind those of z, λ and the probes."""
LABELS = ("I8", "I16", "I32")
IGNORE_INDEX = -100
_DTYPES = {WORDS[code]: code for code in FLOATS}


class Coding(Protocol):
    """What checks ask of a codec."""

    @property
    def form(self) -> Any:
        """The engine's dtype of ``values``."""

    def columns(self, width: int) -> int:
        """Of ``values``, for rows of ``width`` numbers."""

    def scales(self, rows: int) -> int | None:
        """How many scales go with so many rows; None: no scale."""


def probe_index(probe: int, side: int) -> int:
    """Of the z of one side of a probe, in the stream of the rounding."""
    return 2 + 2 * probe + side


def check_coded(arrays: Arrays, codecs: Mapping[str, Coding], kind: str, name: str, coded: Any) -> None:
    """A coded tensor: ``codec`` and ``dtype`` are known; ``width``, ``values`` and ``scale`` fit them."""
    check_strings(kind, **{f"{name}.codec": coded.codec, f"{name}.dtype": coded.dtype})
    if coded.codec not in codecs:
        raise FieldError(f"{kind}: {name}.codec must be one of {', '.join(codecs)}, got {coded.codec!r:.80}")
    if coded.dtype not in _DTYPES:
        raise DtypeError(f"{kind}: {name}.dtype must be one of {', '.join(_DTYPES)}, got {coded.dtype!r:.80}")
    check_counts(kind, **{f"{name}.width": coded.width})
    codec = codecs[coded.codec]
    code = _DTYPES[coded.dtype] if coded.codec == "fp32" else arrays.code(codec.form)
    check_tensor(arrays, kind, f"{name}.values", coded.values, 2, (code,))
    columns = codec.columns(coded.width)
    if not coded.width or coded.values.shape[1] != columns:
        raise ShapeError(f"{kind}: {name}.values must have {columns} > 0 columns, got {[*coded.values.shape]}")
    scales = codec.scales(len(coded.values))
    if scales is None:
        if coded.scale is not None:
            raise FieldError(f"{kind}: {name} has a scale, but {coded.codec} knows none")
        return
    check_tensor(arrays, kind, f"{name}.scale", coded.scale, 1, ("BF16",))
    if len(coded.scale) != scales:
        raise ShapeError(f"{kind}: {name} must have {scales} scales, got {len(coded.scale)}")


@dataclass(frozen=True, eq=False)
class SmashedDataFields:
    """Client k to server: the activations at the cut with what the loss needs, and never the inputs.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        z: Smashed data of the valid tokens, (n, h), coded.
        labels: int8, int16 or int32, the narrowest that holds them; (n,) for one label per valid token (-100 where
            there is none), (B,) for one per sequence.
        mask: Valid tokens, (B, S) bool with n of them True.
        labels_per_token: Which of the two the labels are; their length does not tell when n = B.
        attempt: How often the round was repeated before, >= 0.
        step: The client's local step within the round, >= 0.
    """

    kind: ClassVar[str] = "smashed_data"
    round: int
    client: int
    z: Any
    labels: Any
    mask: Any
    labels_per_token: bool
    attempt: int = 0
    step: int = 0

    def unpacked_bytes(self) -> int:
        """Memory of what `unpack` returns: z, int64 labels and the mask, padding included."""
        return math.prod(self.mask.shape) * (int(self.z.row_bytes()) + 8 + 1)

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt, step=self.step)
        self.z.check(self.kind, "z")
        check_tensor(arrays, self.kind, "labels", self.labels, 1, LABELS)
        check_tensor(arrays, self.kind, "mask", self.mask, 2, ("BOOL",))
        if not isinstance(self.labels_per_token, bool):
            raise FieldError(f"smashed_data: labels_per_token must be a bool, got {self.labels_per_token!r:.80}")
        rows, valid = len(self.z.values), int(self.mask.sum())
        if rows != valid:
            raise ShapeError(f"smashed_data: z has {rows} rows, the mask {valid} valid tokens")
        expected = valid if self.labels_per_token else len(self.mask)
        if len(self.labels) != expected:
            raise ShapeError(f"smashed_data: expected {expected} labels, got {len(self.labels)}")


@dataclass(frozen=True, eq=False)
class MultiplierFields:
    """Server to client k: λ_k = ∂ℓ_k/∂z_k at the valid tokens, not weighted by w_k.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        multiplier: λ_k, (n, h), coded; it comes back in the dtype it had.
        attempt: How often the round was repeated before, >= 0.
        step: That of the smashed data it answers, >= 0.
    """

    kind: ClassVar[str] = "multiplier"
    round: int
    client: int
    multiplier: Any
    attempt: int = 0
    step: int = 0

    def unpacked_bytes(self) -> int:
        """Memory of λ_k without its padding, which is the receiver's own."""
        return int(self.multiplier.restored_bytes())

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt, step=self.step)
        self.multiplier.check(self.kind, "multiplier")


@dataclass(frozen=True, eq=False)
class ProbedDataFields:
    """Client k to server: z = f_c(x_k; θ_c + μ u_p) or f_c(x_k; θ_c − μ u_p) at the valid tokens.

    Labels and mask are those of the round's `SmashedData`. Reference: HOSL, arXiv 2601.10940.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        probe: Index p of the direction, from 0 on.
        side: 0 for θ_c + μ u_p, 1 for θ_c − μ u_p.
        z: (n, h), coded; it comes back in the dtype it had.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "probed_data"
    round: int
    client: int
    probe: int
    side: int
    z: Any
    attempt: int = 0

    def unpacked_bytes(self) -> int:
        """Memory of z without its padding, which is the receiver's own."""
        return int(self.z.restored_bytes())

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt)
        check_probe(self.kind, self.probe, self.side)
        self.z.check(self.kind, "z")


@dataclass(frozen=True, eq=False)
class CodedGradientFields:
    """Client k to server: what `ProjectedGradients` holds, its coefficients coded in rows of 128.

    With int8 and int4 the rounding is unbiased and each client's noise is its own: the mean over K clients is that of
    the gradients, in expectation, and its variance falls like 1/K.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        basis: How the coefficients are to be read.
        coefficients: (⌈P/128⌉, 128) float32, coded. What fills up the last row is zero as `pack` makes it, and is not
            read: like the bits behind a mask's last, it carries nothing.
        count: P.
        num_terms: n_k.
        attempt: How often the round was repeated before, >= 0.
    """

    kind: ClassVar[str] = "coded_gradient"
    round: int
    client: int
    basis: dict[str, Any]
    coefficients: Any
    count: int
    num_terms: int
    attempt: int = 0

    def unpacked_bytes(self) -> int:
        """Memory of what `unpack` returns."""
        return int(self.coefficients.restored_bytes())

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, count=self.count, num_terms=self.num_terms)
        check_counts(self.kind, attempt=self.attempt)
        check_settings(self.kind, "basis", self.basis)
        self.coefficients.check(self.kind, "coefficients")
        if self.coefficients.dtype != "float32":
            raise DtypeError(f"{self.kind}: coefficients.dtype must be float32, got {self.coefficients.dtype}")
        rows, wanted = len(self.coefficients.values), -(-self.count // ROW)
        if (rows, self.coefficients.width) != (wanted, ROW):
            raise ShapeError(
                f"{self.kind}: a count of {self.count} needs {wanted} rows of {ROW} coefficients, got {rows} of "
                f"{self.coefficients.width}"
            )
