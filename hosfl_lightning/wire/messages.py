"""The four messages of a round, in the order in which they travel.

    step 2   client k -> server   SmashedData          z_k, labels, valid-token mask
    step 3   server -> client k   Multiplier           λ_k = ∂ℓ_k/∂z_k
    step 4   client k -> server   ProjectedGradients   v_kp, p = 1..P
    step 5   server -> everybody  Update               v̄_p = Σ_k w_k v_kp, and the rule that applies it

Padding never travels: per-token tensors hold the n valid tokens only, row-major over the (B, S) positions where the
mask is True. Messages compare by identity, since tensors do not compare to one truth value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from hosfl_lightning.wire.errors import FieldError

IGNORE_INDEX = -100
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class SmashedData:
    """Client k to server: the activations at the cut with what the loss needs, and never the inputs.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        z: Smashed data of the valid tokens, (n, h), any floating dtype; it travels bit for bit.
        labels: int64; (n,) for one label per valid token (-100 where there is none), (B,) for one per sequence.
        mask: Valid tokens, (B, S) bool with n of them True.
        labels_per_token: Which of the two the labels are; their length does not tell when n = B.
    """

    kind: ClassVar[str] = "smashed_data"
    round: int
    client: int
    z: Tensor
    labels: Tensor
    mask: Tensor
    labels_per_token: bool

    @classmethod
    def pack(cls, round: int, client: int, z: Tensor, labels: Tensor, mask: Tensor) -> SmashedData:
        """Drops the padding.

        Args:
            round: Round number.
            client: Client number k.
            z: Smashed data, (B, S, h).
            labels: (B, S) for a causal LM, (B,) for classification.
            mask: Valid tokens, (B, S) bool; the padding may be on either side.

        Raises:
            FieldError: Shapes that do not fit, or a mask that is not bool.
        """
        _check_padded(cls.kind, "z", z, mask)
        if labels.shape not in (mask.shape, mask.shape[:1]):
            raise FieldError(
                f"smashed_data: labels must be (B, S) = {tuple(mask.shape)} or (B,), got {tuple(labels.shape)}"
            )
        per_token = labels.dim() == 2
        labels = labels[mask] if per_token else labels
        return cls(round, client, z[mask], labels.to(torch.int64), mask, per_token)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """Puts the padding back.

        Returns:
            z (B, S, h) with zeros at padding; labels, (B, S) with -100 at padding or (B,); mask (B, S).
        """
        labels = self.labels
        if self.labels_per_token:
            labels = labels.new_full(self.mask.shape, IGNORE_INDEX)
            labels[self.mask] = self.labels
        return _scatter(self.z, self.mask), labels, self.mask

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        _check_counts(self.kind, round=self.round, client=self.client)
        _check_tensor(self.kind, "z", self.z, 2, _FLOATS)
        _check_tensor(self.kind, "labels", self.labels, 1, (torch.int64,))
        _check_tensor(self.kind, "mask", self.mask, 2, (torch.bool,))
        if not isinstance(self.labels_per_token, bool):
            raise FieldError(f"smashed_data: labels_per_token must be a bool, got {self.labels_per_token!r}")
        valid = int(self.mask.sum())
        if len(self.z) != valid:
            raise FieldError(f"smashed_data: z has {len(self.z)} rows, the mask {valid} valid tokens")
        expected = valid if self.labels_per_token else len(self.mask)
        if len(self.labels) != expected:
            raise FieldError(f"smashed_data: expected {expected} labels, got {len(self.labels)}")


@dataclass(frozen=True, eq=False)
class Multiplier:
    """Server to client k: λ_k = ∂ℓ_k/∂z_k at the valid tokens, not weighted by w_k.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        multiplier: λ_k, (n, h), in the dtype of z; it travels bit for bit.
    """

    kind: ClassVar[str] = "multiplier"
    round: int
    client: int
    multiplier: Tensor

    @classmethod
    def pack(cls, round: int, client: int, multiplier: Tensor, mask: Tensor) -> Multiplier:
        """Drops the padding of ``multiplier`` (B, S, h) by ``mask`` (B, S) bool.

        Raises:
            FieldError: Shapes that do not fit, or a mask that is not bool.
        """
        _check_padded(cls.kind, "multiplier", multiplier, mask)
        return cls(round, client, multiplier[mask])

    def unpack(self, mask: Tensor) -> Tensor:
        """λ_k as (B, S, h) with zeros at padding; ``mask`` is the one the client sent.

        Raises:
            FieldError: The mask has another number of valid tokens than λ_k has rows.
        """
        valid = int(mask.sum())
        if len(self.multiplier) != valid:
            raise FieldError(f"multiplier: {len(self.multiplier)} rows for a mask of {valid} valid tokens")
        return _scatter(self.multiplier, mask)

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        _check_counts(self.kind, round=self.round, client=self.client)
        _check_tensor(self.kind, "multiplier", self.multiplier, 2, _FLOATS)


@dataclass(frozen=True, eq=False)
class ProjectedGradients:
    """Client k to server: v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩, or another estimate's coefficients.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0.
        basis: How the coefficients are to be read, e.g. ``{"kind": "shared_directions", "probes": 2}``.
        coefficients: v_kp, (P,) float32.
        num_terms: n_k, the loss terms behind them, from which the server makes w_k.
    """

    kind: ClassVar[str] = "projected_gradients"
    round: int
    client: int
    basis: dict[str, int | float | str]
    coefficients: Tensor
    num_terms: int

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        _check_counts(self.kind, round=self.round, client=self.client, num_terms=self.num_terms)
        _check_mapping(self.kind, "basis", self.basis)
        _check_tensor(self.kind, "coefficients", self.coefficients, 1, (torch.float32,))


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
        mu: Smoothing length of the probes as rounded; None where there are none.
        incarnation: Which server, on which hardware, made it.
    """

    kind: ClassVar[str] = "update"
    round: int
    basis: dict[str, int | float | str]
    coefficients: Tensor
    rule: dict[str, Any]
    step: int
    participants: list[int]
    weights: list[float]
    mu: float | None = None
    incarnation: str = ""

    def check(self) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        _check_counts(self.kind, round=self.round, step=self.step)
        _check_mapping(self.kind, "basis", self.basis)
        _check_mapping(self.kind, "rule", self.rule)
        _check_tensor(self.kind, "coefficients", self.coefficients, 1, (torch.float32,))
        _check_list(self.kind, "participants", self.participants, (int,))
        _check_list(self.kind, "weights", self.weights, (int, float))
        if len(self.participants) != len(self.weights):
            raise FieldError(f"update: {len(self.participants)} participants, but {len(self.weights)} weights")
        if self.mu is not None and not (type(self.mu) is float and 0 < self.mu < math.inf):
            raise FieldError(f"update: mu must be None or a finite number > 0, got {self.mu!r}")
        if not isinstance(self.incarnation, str):
            raise FieldError(f"update: incarnation must be a string, got {self.incarnation!r}")


Message: TypeAlias = SmashedData | Multiplier | ProjectedGradients | Update
MESSAGES: dict[str, type[Message]] = {cls.kind: cls for cls in (SmashedData, Multiplier, ProjectedGradients, Update)}


def _scatter(rows: Tensor, mask: Tensor) -> Tensor:
    padded = rows.new_zeros(*mask.shape, rows.shape[1])
    padded[mask] = rows
    return padded


def _check_padded(kind: str, name: str, value: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise FieldError(f"{kind}: the mask must be bool (attention_mask.bool()), got {mask.dtype}")
    if mask.dim() != 2 or value.dim() != 3 or value.shape[:2] != mask.shape:
        raise FieldError(
            f"{kind}: {name} must be (B, S, h) and the mask (B, S), got {tuple(value.shape)} and {tuple(mask.shape)}"
        )


def _check_counts(kind: str, **counts: object) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise FieldError(f"{kind}: {name} must be an integer >= 0, got {value!r}")


def _check_tensor(kind: str, name: str, value: object, dim: int, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise FieldError(f"{kind}: {name} must be a tensor, got {type(value).__name__}")
    if value.dim() != dim or value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise FieldError(f"{kind}: {name} must have {dim} dimensions of {wanted}, got {value.dtype} {[*value.shape]}")


def _check_mapping(kind: str, name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FieldError(f"{kind}: {name} must be a dict with string keys, got {value!r}")


def _check_list(kind: str, name: str, value: object, types: tuple[type, ...]) -> None:
    if not isinstance(value, list) or not all(type(item) in types for item in value):
        raise FieldError(f"{kind}: {name} must be a list of {types[-1].__name__}, got {value!r}")
