"""The engine under a client: what a split round asks of whatever runs its half."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hosfl_lightning.clients.base import Anchor
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.optim import Basis, SharedDirections
from hosfl_lightning.wire import Update


class Half(Protocol):
    """``f_c(x; θ_c)`` in some engine: four methods, with tensors on both sides of them.

    The clients of this package are halves in PyTorch (`SplitClient` and what is under it). Another engine implements
    these and is given to a `SplitEndpoint` in `Endpoint.make_client`; nothing of PyTorch's autograd or modules is asked
    for. That is a client behind a fleet. A simulation asks more: of its clients' halves it makes the server's replica,
    its checkpoints and its memory report, for which it reads ``half`` and ``optimizer``.
    """

    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """Step 2: z ``(B, S, h)``, and what must be kept until λ comes."""

    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """Step 4: ``(K, basis.size)`` fp32 coefficients of each client's ``∇⟨λ_k, f_c(x_k; θ_c)⟩``."""

    def probe(self, batch: Batch, basis: SharedDirections, probe: int, scale: float) -> Tensor:
        """``f_c(x; θ_c + scale · u_probe)``; θ_c has its bits again afterwards. Of methods whose server probes."""

    def apply(self, update: Update) -> None:
        """Step 6: ``θ_c ← rule(θ_c, ĝ)``."""
