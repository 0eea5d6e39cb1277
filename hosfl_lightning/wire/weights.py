"""The message of a method that averages full vectors: trained tensors by name, in either direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hosfl_lightning.wire.checks import check_counts, check_named_tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """

    kind: ClassVar[str] = "weights"
    round: int
    client: int | None
    tensors: dict[str, Tensor]
    num_terms: int = 0

    def check(self) -> None:
        """Raises FieldError unless types and dtypes are as stated above."""
        check_counts(self.kind, round=self.round, num_terms=self.num_terms)
        if self.client is not None:
            check_counts(self.kind, client=self.client)
        check_named_tensors(self.kind, "tensors", self.tensors, _DTYPES)
