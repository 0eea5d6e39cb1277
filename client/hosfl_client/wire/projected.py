"""The two messages in which a round's few scalars travel: a client's, and what the server makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import (
    check_clients,
    check_counts,
    check_loss,
    check_settings,
    check_strings,
    check_tensor,
)
from hosfl_client.wire.errors import FieldError


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
    coefficients: Any
    num_terms: int
    attempt: int = 0
    loss: float | None = None
    num_examples: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, client=self.client, num_terms=self.num_terms)
        check_counts(self.kind, attempt=self.attempt, num_examples=self.num_examples)
        check_settings(self.kind, "basis", self.basis)
        check_tensor(arrays, self.kind, "coefficients", self.coefficients, 1, ("F32",))
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
    coefficients: Any
    rule: dict[str, Any]
    step: int
    participants: list[int]
    weights: list[float]
    mu: float | None = None
    incarnation: str = ""
    attempt: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are as stated above."""
        check_counts(self.kind, round=self.round, step=self.step, attempt=self.attempt)
        check_settings(self.kind, "basis", self.basis)
        check_settings(self.kind, "rule", self.rule)
        check_tensor(arrays, self.kind, "coefficients", self.coefficients, 1, ("F32",))
        check_clients(self.kind, self.participants, self.weights)
        if self.mu is not None and not (isinstance(self.mu, float) and 0 < self.mu < math.inf):
            raise FieldError(f"update: mu must be a float > 0 or None, got {self.mu!r:.80}")
        check_strings(self.kind, incarnation=self.incarnation)
