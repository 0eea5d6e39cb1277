"""The messages of a run, with arrays of numpy, and their bytes: `hosfl_client.wire.kinds` says which travels when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias, get_args

import numpy as np

from hosfl_client.arrays import ARRAYS
from hosfl_client.bfloat16 import Array
from hosfl_client.codecs import Coded
from hosfl_client.padding import pack_rows, rounding_stream, unpack_rows
from hosfl_client.u_shape import MiddleOutput, OutputMultiplier, UnlabelledData
from hosfl_client.wire.acknowledgement import Acknowledgement
from hosfl_client.wire.catch_up import CatchUpRequest, Snapshot
from hosfl_client.wire.checks import check_probe, check_tensor
from hosfl_client.wire.coded import (
    GRADIENT,
    IGNORE_INDEX,
    LABELS,
    MULTIPLIER,
    ROW,
    CodedGradientFields,
    MultiplierFields,
    ProbedDataFields,
    SmashedDataFields,
    Z,
    probe_index,
)
from hosfl_client.wire.errors import FieldError, ShapeError
from hosfl_client.wire.frames import Frames
from hosfl_client.wire.joining import Bye, Hello
from hosfl_client.wire.projected import ProjectedGradients, Update
from hosfl_client.wire.requests import HeldOutRequest, ProbeRequest, RoundEnd, StepRequest
from hosfl_client.wire.secure import MaskedGradients, SecureKeys, SecurePeers, SecureShares, UnmaskRequest
from hosfl_client.wire.terms import Terms
from hosfl_client.wire.weights import Weights


@dataclass(frozen=True, eq=False)
class SmashedData(SmashedDataFields):
    """The activations at the cut, with what the loss needs."""

    z: Coded
    labels: Array
    mask: Array

    @classmethod
    def pack(
        cls,
        round: int,
        client: int,
        z: Array,
        labels: Array,
        mask: Array,
        codec: str = "fp32",
        seed: int = 0,
        step: int = 0,
        attempt: int = 0,
    ) -> SmashedData:
        """Drops the padding and codes z.

        Args:
            round: Round number.
            client: Client number k.
            z: Smashed data, (B, S, h).
            labels: (B, S) for a causal LM, (B,) for classification.
            mask: Valid tokens, (B, S) bool; the padding may be on either side.
            codec: How z travels, one of `CODECS`.
            seed: The run's, for the rounding of int8 and int4.
            step: The client's local step within the round, for the same: each z has noise of its own.
            attempt: Of the round.

        Raises:
            FieldError: Shapes that do not fit, a mask that is not bool, a label beyond 32 bits, an unknown codec, or a
                local step out of range.
        """
        stream = rounding_stream(cls.kind, seed, round, client, step)
        coded = pack_rows(cls.kind, "z", z, mask, codec, stream, Z)
        if labels.shape not in (mask.shape, mask.shape[:1]):
            raise ShapeError(f"smashed_data: labels must be (B, S) = {mask.shape} or (B,), got {labels.shape}")
        per_token = labels.ndim == 2
        labels = _narrowest(labels[mask] if per_token else labels)
        return cls(round, client, coded, labels, mask, per_token, attempt, step)

    def unpack(self) -> tuple[Array, Array, Array]:
        """Restores z and puts the padding back.

        Returns:
            z (B, S, h) with zeros at padding; int64 labels, (B, S) with -100 at padding or (B,); mask (B, S).
        """
        return unpack_rows(self.kind, self.z, self.mask), self.unpack_labels(), self.mask

    def unpack_labels(self) -> Array:
        """The labels alone, as `unpack` returns them."""
        labels = self.labels.astype(np.int64)
        if not self.labels_per_token:
            return labels
        padded = np.full(self.mask.shape, IGNORE_INDEX, np.int64)
        padded[self.mask] = labels
        return padded

    def with_z(self, z: Coded) -> SmashedData:
        """The same with another z of the same tokens, which came without labels and mask."""
        return replace(self, z=z)


@dataclass(frozen=True, eq=False)
class Multiplier(MultiplierFields):
    """λ_k."""

    multiplier: Coded

    @classmethod
    def pack(
        cls,
        round: int,
        client: int,
        multiplier: Array,
        mask: Array,
        codec: str = "fp32",
        seed: int = 0,
        step: int = 0,
        attempt: int = 0,
    ) -> Multiplier:
        """Drops the padding of ``multiplier`` (B, S, h) by ``mask`` (B, S) bool, and codes it.

        Raises:
            FieldError: Shapes that do not fit, a mask that is not bool, an unknown codec, or a local step out of range.
        """
        stream = rounding_stream(cls.kind, seed, round, client, step)
        coded = pack_rows(cls.kind, "multiplier", multiplier, mask, codec, stream, MULTIPLIER)
        return cls(round, client, coded, attempt, step)

    def unpack(self, mask: Array) -> Array:
        """λ_k as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than λ_k has rows.
        """
        return unpack_rows(self.kind, self.multiplier, mask)


@dataclass(frozen=True, eq=False)
class ProbedData(ProbedDataFields):
    """z of one side of a probe."""

    z: Coded

    @classmethod
    def pack(
        cls,
        round: int,
        client: int,
        probe: int,
        side: int,
        z: Array,
        mask: Array,
        codec: str = "fp32",
        seed: int = 0,
        step: int = 0,
        attempt: int = 0,
    ) -> ProbedData:
        """Drops the padding of ``z`` (B, S, h) by ``mask`` (B, S) bool, and codes it.

        Raises:
            FieldError: Shapes that do not fit, a mask that is not bool, an unknown codec, or a probe, side or local
                step out of range.
        """
        check_probe(cls.kind, probe, side)
        stream = rounding_stream(cls.kind, seed, round, client, step)
        coded = pack_rows(cls.kind, "z", z, mask, codec, stream, probe_index(probe, side))
        return cls(round, client, probe, side, coded, attempt)

    def unpack(self, mask: Array) -> Array:
        """z as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than z has rows.
        """
        return unpack_rows(self.kind, self.z, mask)


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
        coefficients: Array,
        num_terms: int,
        codec: str,
        seed: int,
        attempt: int = 0,
    ) -> CodedGradient:
        """Codes ``coefficients`` (P,) float32.

        Raises:
            FieldError: An unknown codec, or coefficients of another shape or dtype.
        """
        check_tensor(ARRAYS, cls.kind, "coefficients", coefficients, 1, ("F32",))
        count = len(coefficients)
        rows = np.pad(coefficients, (0, -count % ROW)).reshape(-1, ROW)
        coded = Coded.of(rows, codec, rounding_stream(cls.kind, seed, round, client, 0), GRADIENT)
        return cls(round, client, basis, coded, count, num_terms, attempt)

    def unpack(self) -> Array:
        """The coefficients as the server knows them, (P,) float32."""
        return self.coefficients.restore().reshape(-1)[: self.count]


Message: TypeAlias = (
    SmashedData
    | Multiplier
    | ProjectedGradients
    | Update
    | CatchUpRequest
    | Snapshot
    | Weights
    | ProbedData
    | CodedGradient
    | StepRequest
    | ProbeRequest
    | RoundEnd
    | Terms
    | Hello
    | Bye
    | HeldOutRequest
    | Acknowledgement
    | UnlabelledData
    | MiddleOutput
    | OutputMultiplier
    | SecureKeys
    | SecurePeers
    | SecureShares
    | MaskedGradients
    | UnmaskRequest
)
MESSAGES: dict[str, type[Message]] = {cls.kind: cls for cls in get_args(Message)}
"""By kind."""
FRAMES: Frames[Message] = Frames(ARRAYS, MESSAGES)
encode = FRAMES.encode
encoded_size = FRAMES.encoded_size
decode = FRAMES.decode
check_finite = FRAMES.check_finite


def _narrowest(labels: Array) -> Array:
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    for dtype in (ARRAYS.dtypes[code] for code in LABELS):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return labels.astype(dtype)
    raise FieldError(f"smashed_data: labels from {low} to {high} are beyond 32 bits")
