"""The messages of a run, with tensors of PyTorch: `hosfl_client.wire.kinds` says which travels when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, get_args

import torch
from torch import Tensor

from hosfl_client.padding import rounding_stream
from hosfl_client.wire.acknowledgement import Acknowledgement
from hosfl_client.wire.catch_up import CatchUpRequest, Snapshot
from hosfl_client.wire.coded import IGNORE_INDEX, LABELS, MULTIPLIER, MultiplierFields, SmashedDataFields, Z
from hosfl_client.wire.errors import FieldError, ShapeError
from hosfl_client.wire.joining import Bye, Hello
from hosfl_client.wire.projected import ProjectedGradients, Update
from hosfl_client.wire.requests import HeldOutRequest, ProbeRequest, RoundEnd, StepRequest
from hosfl_client.wire.secure import MaskedGradients, SecureKeys, SecurePeers, SecureShares, UnmaskRequest
from hosfl_client.wire.terms import Terms
from hosfl_client.wire.weights import Weights
from hosfl_lightning.wire.arrays import TENSORS
from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.coded_gradient import CodedGradient
from hosfl_lightning.wire.padding import pack_rows, unpack_rows
from hosfl_lightning.wire.probed_data import ProbedData
from hosfl_lightning.wire.u_shape import MiddleOutput, OutputMultiplier, UnlabelledData


@dataclass(frozen=True, eq=False)
class SmashedData(SmashedDataFields):
    """The activations at the cut, with what the loss needs."""

    z: Coded
    labels: Tensor
    mask: Tensor

    @classmethod
    def pack(
        cls,
        round: int,
        client: int,
        z: Tensor,
        labels: Tensor,
        mask: Tensor,
        codec: str = "fp32",
        seed: int = 0,
        step: int = 0,
        attempt: int = 0,
    ) -> SmashedData:
        """Drops the padding and codes z.

        Args:
            round: Round number.
            client: Client number k.
            z: Smashed data, (B, S, h), on any device.
            labels: (B, S) for a causal LM, (B,) for classification; on the host, or this waits for their device.
            mask: Valid tokens, (B, S) bool; the padding may be on either side; on the host.
            codec: How z travels, one of `CODECS`.
            seed: The run's, for the rounding of int8 and int4.
            step: The client's local step within the round, for the same: each z has noise of its own.
            attempt: Of the round.

        Raises:
            FieldError: Shapes that do not fit, a mask that is not bool, a label beyond 32 bits, an unknown codec, or a
                local step out of range.
        """
        stream = rounding_stream(cls.kind, seed, round, client, step)
        coded = pack_rows(cls.kind, "z", z, mask, codec, stream, tensor=Z)
        if labels.shape not in (mask.shape, mask.shape[:1]):
            raise ShapeError(
                f"smashed_data: labels must be (B, S) = {tuple(mask.shape)} or (B,), got {tuple(labels.shape)}"
            )
        per_token = labels.dim() == 2
        labels = _narrowest(labels[mask] if per_token else labels)
        return cls(round, client, coded, labels, mask, per_token, attempt, step)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Restores z and puts the padding back.

        Returns:
            z (B, S, h) with zeros at padding; int64 labels, (B, S) with -100 at padding or (B,); mask (B, S).
        """
        return unpack_rows(self.kind, self.z, self.mask), self.unpack_labels(), self.mask

    def unpack_labels(self) -> Tensor:
        """The labels alone, as `unpack` returns them."""
        labels = self.labels.to(torch.int64)
        if not self.labels_per_token:
            return labels
        padded = labels.new_full(self.mask.shape, IGNORE_INDEX)
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
        multiplier: Tensor,
        mask: Tensor,
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
        coded = pack_rows(cls.kind, "multiplier", multiplier, mask, codec, stream, tensor=MULTIPLIER)
        return cls(round, client, coded, attempt, step)

    def unpack(self, mask: Tensor) -> Tensor:
        """λ_k as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than λ_k has rows.
        """
        return unpack_rows(self.kind, self.multiplier, mask)


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


def _narrowest(labels: Tensor) -> Tensor:
    low, high = (int(value) for value in labels.aminmax()) if labels.numel() else (0, 0)
    for dtype in (TENSORS.dtypes[code] for code in LABELS):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return labels.to(dtype)
    raise FieldError(f"smashed_data: labels from {low} to {high} are beyond 32 bits")
