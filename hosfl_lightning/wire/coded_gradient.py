"""The message of a client that sends many coefficients in few bits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hosfl_lightning.wire.checks import check_counts, check_settings, check_tensor
from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.errors import DtypeError, ShapeError
from hosfl_lightning.wire.padding import rounding_stream

ROW = 128
"""Coefficients that share a scale: int8 takes 8.125 bits a coefficient, int4 4.125, ternary 1.75."""
TENSOR = 0xFFFF
"""Index in the stream of the rounding, behind those of z, λ and the probes."""


@dataclass(frozen=True, eq=False)
class CodedGradient:
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
    coefficients: Coded
    count: int
    num_terms: int
    attempt: int = 0

    @classmethod
    def pack(
        cls,
        round: int,
        client: int,
        basis: dict[str, Any],
        coefficients: Tensor,
        num_terms: int,
        codec: str,
        seed: int,
        attempt: int = 0,
    ) -> CodedGradient:
        """Codes ``coefficients`` (P,) float32.

        Raises:
            FieldError: An unknown codec, or coefficients of another shape or dtype.
        """
        check_tensor(cls.kind, "coefficients", coefficients, 1, (torch.float32,))
        count = len(coefficients)
        rows = torch.nn.functional.pad(coefficients, (0, -count % ROW)).reshape(-1, ROW)
        coded = Coded.of(rows, codec, rounding_stream(cls.kind, seed, round, client, 0), TENSOR)
        return cls(round, client, basis, coded, count, num_terms, attempt)

    def unpack(self) -> Tensor:
        """The coefficients as the server knows them, (P,) float32."""
        return self.coefficients.restore().view(-1)[: self.count]

    def unpacked_bytes(self) -> int:
        """Memory of what `unpack` returns."""
        return self.coefficients.restored_bytes()

    def check(self) -> None:
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
