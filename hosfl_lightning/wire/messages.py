"""The messages of a run. A round's, in the order in which they travel:

    step 2   client k -> server   SmashedData          z_k, labels, valid-token mask
    step 3   server -> client k   Multiplier           λ_k = ∂ℓ_k/∂z_k
    step 4   client k -> server   ProjectedGradients   v_kp, p = 1..P
    step 5   server -> everybody  Update               v̄_p = Σ_k w_k v_kp, and the rule that applies it

and those of a client that comes back after missed rounds:

             client k -> server   CatchUpRequest       the version of θ_c that it holds
             server -> client k   Snapshot             θ_c and the optimizer's moments, where updates would not do

The server begins, and asks for what does not follow from its last message; a method sends some of these:

             server -> client k   StepRequest          begin the round, or go on at a local step of it
             server -> client k   ProbeRequest         z at one side of a probe
             server -> everybody  RoundEnd             whose part of a round without an Update counts
             client k -> server   Hello                when it joins: who it is
             server -> client k   Terms                then: all of a run that a client must know
             either way           Bye                  the end of a client's stream, and why
             server -> client k   HeldOutRequest       z of a batch of its validation data
             either way           Weights              full vectors, which the server averages
             client k -> server   ProbedData           z_k of one probe, which the server evaluates
             client k -> server   CodedGradient        ProjectedGradients whose coefficients have few bits each
             client k -> server   Acknowledgement      it has moved what is its own; in the place of step 4, without 5

Every message of a round says in which attempt of it it was sent, so that a late answer is known as one.

Padding never travels: per-token tensors hold the n valid tokens only, row-major over the (B, S) positions where the
mask is True. A message holds what travels, rounded by its codec already, so that it means the same whether it is
serialised or handed over. Messages compare by identity, since tensors do not compare to one truth value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, get_args

import torch
from torch import Tensor

from hosfl_lightning.wire.acknowledgement import Acknowledgement
from hosfl_lightning.wire.catch_up import CatchUpRequest, Snapshot
from hosfl_lightning.wire.checks import (
    check_clients,
    check_counts,
    check_loss,
    check_settings,
    check_strings,
    check_tensor,
)
from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.coded_gradient import CodedGradient
from hosfl_lightning.wire.errors import FieldError, ShapeError
from hosfl_lightning.wire.joining import Bye, Hello
from hosfl_lightning.wire.padding import pack_rows, rounding_stream, unpack_rows
from hosfl_lightning.wire.probed_data import ProbedData
from hosfl_lightning.wire.requests import HeldOutRequest, ProbeRequest, RoundEnd, StepRequest
from hosfl_lightning.wire.terms import Terms
from hosfl_lightning.wire.weights import Weights

IGNORE_INDEX = -100
_LABELS = (torch.int8, torch.int16, torch.int32)


@dataclass(frozen=True, eq=False)
class SmashedData:
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
    z: Coded
    labels: Tensor
    mask: Tensor
    labels_per_token: bool
    attempt: int = 0
    step: int = 0

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
        coded = pack_rows(cls.kind, "z", z, mask, codec, stream, tensor=0)
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

    def unpacked_bytes(self) -> int:
        """Memory of what `unpack` returns."""
        return self.mask.numel() * (self.z.row_bytes() + torch.int64.itemsize + torch.bool.itemsize)

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt, step=self.step)
        self.z.check(self.kind, "z")
        check_tensor(self.kind, "labels", self.labels, 1, _LABELS)
        check_tensor(self.kind, "mask", self.mask, 2, (torch.bool,))
        if not isinstance(self.labels_per_token, bool):
            raise FieldError(f"smashed_data: labels_per_token must be a bool, got {self.labels_per_token!r:.80}")
        rows, valid = len(self.z.values), int(self.mask.sum())
        if rows != valid:
            raise ShapeError(f"smashed_data: z has {rows} rows, the mask {valid} valid tokens")
        expected = valid if self.labels_per_token else len(self.mask)
        if len(self.labels) != expected:
            raise ShapeError(f"smashed_data: expected {expected} labels, got {len(self.labels)}")


@dataclass(frozen=True, eq=False)
class Multiplier:
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
    multiplier: Coded
    attempt: int = 0
    step: int = 0

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
        coded = pack_rows(cls.kind, "multiplier", multiplier, mask, codec, stream, tensor=1)
        return cls(round, client, coded, attempt, step)

    def unpack(self, mask: Tensor) -> Tensor:
        """λ_k as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            ShapeError: The mask has another number of valid tokens than λ_k has rows.
        """
        return unpack_rows(self.kind, self.multiplier, mask)

    def unpacked_bytes(self) -> int:
        """Memory of λ_k without its padding, which is the receiver's own."""
        return self.multiplier.restored_bytes()

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, attempt=self.attempt, step=self.step)
        self.multiplier.check(self.kind, "multiplier")


@dataclass(frozen=True, eq=False)
class ProjectedGradients:
    """Client k to server: v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩, or another estimate's coefficients.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        basis: How the coefficients are to be read, e.g. ``{"kind": "shared_directions", "probes": 2}``.
        coefficients: v_kp, (P,) float32.
        num_terms: n_k, the loss terms behind them, from which the server makes w_k.
        attempt: How often the round was repeated before, >= 0.
        loss: ℓ_k, nats, where the client alone knows it.
        num_examples: The examples behind them, where z does not tell.
    """

    kind: ClassVar[str] = "projected_gradients"
    round: int
    client: int
    basis: dict[str, Any]
    coefficients: Tensor
    num_terms: int
    attempt: int = 0
    loss: float | None = None
    num_examples: int = 0

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, num_terms=self.num_terms)
        check_counts(self.kind, attempt=self.attempt, num_examples=self.num_examples)
        check_settings(self.kind, "basis", self.basis)
        check_tensor(self.kind, "coefficients", self.coefficients, 1, (torch.float32,))
        check_loss(self.kind, self.loss)


@dataclass(frozen=True, eq=False)
class Update:
    """Server to everybody: v̄_p = Σ_k w_k v_kp with all that is needed to apply it, now or in a later replay.

    Attributes:
        round: Round number, >= 0.
        basis: How the coefficients are to be read.
        coefficients: v̄_p, (P,) float32.
        rule: The optimizer's rule: its name, this step's learning rate and every hyper-parameter. Tuples arrive as
            lists.
        step: The rule's step count, >= 0.
        participants: The clients k whose coefficients are in the mean.
        weights: Their w_k, in the same order.
        mu: μ, the smoothing length as it was rounded; None where there are no probes.
        incarnation: Which server, on which hardware, made it.
        attempt: How often the round was repeated before: with the round it tells who was online.
    """

    kind: ClassVar[str] = "update"
    round: int
    basis: dict[str, Any]
    coefficients: Tensor
    rule: dict[str, Any]
    step: int
    participants: list[int]
    weights: list[float]
    mu: float | None = None
    incarnation: str = ""
    attempt: int = 0

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, step=self.step, attempt=self.attempt)
        check_settings(self.kind, "basis", self.basis)
        check_settings(self.kind, "rule", self.rule)
        check_tensor(self.kind, "coefficients", self.coefficients, 1, (torch.float32,))
        check_clients(self.kind, self.participants, self.weights)
        if self.mu is not None and not (isinstance(self.mu, float) and 0 < self.mu < math.inf):
            raise FieldError(f"update: mu must be a float > 0 or None, got {self.mu!r:.80}")
        check_strings(self.kind, incarnation=self.incarnation)


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
)
MESSAGES: dict[str, type[Message]] = {cls.kind: cls for cls in get_args(Message)}
"""By kind; the number of a kind in a frame is its place here, from 1 on."""


def _narrowest(labels: Tensor) -> Tensor:
    low, high = (int(value) for value in labels.aminmax()) if labels.numel() else (0, 0)
    for dtype in _LABELS:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return labels.to(dtype)
    raise FieldError(f"smashed_data: labels from {low} to {high} are beyond 32 bits")
