"""The message of a client that sends many coefficients in few bits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hosfl_client.padding import rounding_stream
from hosfl_client.wire.checks import check_tensor
from hosfl_client.wire.coded import GRADIENT, ROW, CodedGradientFields
from hosfl_lightning.wire.arrays import TENSORS
from hosfl_lightning.wire.codecs import Coded


@dataclass(frozen=True, eq=False)
class CodedGradient(CodedGradientFields):
    """Many coefficients, in rows of 128."""

    coefficients: Coded

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
        check_tensor(TENSORS, cls.kind, "coefficients", coefficients, 1, ("F32",))
        count = len(coefficients)
        rows = torch.nn.functional.pad(coefficients, (0, -count % ROW)).reshape(-1, ROW)
        coded = Coded.of(rows, codec, rounding_stream(cls.kind, seed, round, client, 0), GRADIENT)
        return cls(round, client, basis, coded, count, num_terms, attempt)

    def unpack(self) -> Tensor:
        """The coefficients as the server knows them, (P,) float32."""
        return self.coefficients.restore().view(-1)[: self.count]
