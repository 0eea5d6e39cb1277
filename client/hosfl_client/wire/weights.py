"""The message of a method that averages full vectors: trained tensors by name, in either direction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.checks import check_counts, check_loss, check_named_tensors, check_settings

_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, eq=False)
class Weights:
    """Client k to server: θ_k after its local steps. Server to clients: θ = Σ_k w_k θ_k, w_k = n_k / Σ n.

    Reference: B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data"
    (AISTATS 2017), algorithm 1.

    Attributes:
        round: Round number, >= 0.
        client: Client number k, >= 0; None from the server to everybody.
        tensors: Full vectors by the parameters' names; float32, bfloat16 or float16, any shape, bit for bit.
        num_terms: n_k, the loss terms behind a client's weights; 0 from the server.
        attempt: How often the round was repeated before, >= 0.
        rule: From the server, as in a `StepRequest`.
        loss: From a client: the mean over its loss terms, nats, where it alone knows it.
        num_examples: From a client: those of its local steps.
    """

    kind: ClassVar[str] = "weights"
    round: int
    client: int | None
    tensors: dict[str, Any]
    num_terms: int = 0
    attempt: int = 0
    rule: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    num_examples: int = 0

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types and dtypes are as stated above."""
        check_counts(self.kind, round=self.round, num_terms=self.num_terms)
        check_counts(self.kind, attempt=self.attempt, num_examples=self.num_examples)
        if self.client is not None:
            check_counts(self.kind, client=self.client)
        check_named_tensors(arrays, self.kind, "tensors", self.tensors, _DTYPES)
        check_settings(self.kind, "rule", self.rule)
        check_loss(self.kind, self.loss)
