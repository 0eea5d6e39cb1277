"""The client that knows the gradient of its side adapter, and never backpropagates through its half."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hosfl_lightning.clients.base import Anchor
from hosfl_lightning.clients.batched_probes import Size
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.optim import Basis, Dense, SharedDirections, ZerothOrder
from hosfl_lightning.optim.local_gradient import add_local_gradient_
from hosfl_lightning.split.side import Bottleneck, ladder, of_side

Taps = Literal["recompute", "keep"]
Vjp = Callable[[int, Bottleneck, Tensor], None]
"""What to do with the outputs of a tapped layer, of the examples from a first one on."""


class LocalGradientClient(ForwardOnlyClient):
    r"""``g_k = ∂⟨λ_k, z_k⟩/∂θ`` for the bottlenecks ``q_l`` of ``z = h_cut + Σ_l q_l(h_l; θ)``, exactly.

    The path from ``q_l`` to ``⟨λ, z⟩`` is direct: the gradient is a vjp of the bottleneck alone, and no graph enters
    the backbone. LoRA beside the side adapter is probed as by a forward-only client, along the same directions::

        c_kp = ⟨g_k, u_p⟩ + (1/μ) ⟨λ_k, f_c(x_k; LoRA + μ u_p) − z_k⟩

    Recomputed, a dense answer's peak is from two examples on at most 1.05 times that of a forward without the adapter
    and the gradient itself, which is the answer. One example cannot be halved: λ stands beside a whole forward, 1.1.

    Args:
        half: ``f_c``, with a side adapter.
        optimizer: Over θ_c with ``module=half``.
        taps: ``recompute``: when λ comes one more forward, each bottleneck's vjp as its layer passes; what waits for λ
            is z. ``keep``: the layers' outputs wait too, one tensor of z's size each, and nothing runs again.
        probe_batch: As in `ForwardOnlyClient`, of the LoRA beside.

    Raises:
        ValueError: The half has no side adapter.

    Reference: Ladder Side-Tuning, Sung et al., arXiv 2206.06522; the multiplier: HO-SFL, arXiv 2603.14773.
    """

    def __init__(
        self, half: nn.Module, optimizer: ZerothOrder, taps: Taps = "recompute", probe_batch: Size = 1
    ) -> None:
        super().__init__(half, optimizer, probe_batch)
        self.find_side(half, taps)

    def find_side(self, half: nn.Module, taps: Taps = "recompute") -> None:
        """Tell what is known from what is probed.

        Raises:
            ValueError: The half has no side adapter.
        """
        found = ladder(half)
        if found is None:
            raise ValueError("estimator: local needs a side adapter at the client, the one part whose path to the "
                             "smashed data is direct; set model.init_args.side")  # fmt: skip
        self.ladder, self.taps = found, taps
        self.numbers = {id(p): i for i, p in enumerate(self.optimizer.parameters)}
        side = {id(p) for name, p in half.named_parameters() if of_side(name)}
        self.optimizer.probed = {i for key, i in self.numbers.items() if key not in side}

    @torch.no_grad()
    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """``z = f_c(x; θ_c)``, no graph."""
        if self.taps == "recompute":
            return super().forward(batch, rows)
        with self.ladder.keeping() as kept:
            return Anchor(self.evaluate(batch), kept=kept)

    @torch.no_grad()
    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """``(K, basis.size)`` fp32: the known gradients in the basis, and in directions those of the LoRA beside."""
        base = anchor.release(multiplier, rows)
        if not self.optimizer.probed:
            return self._known(batch, anchor, multiplier, rows, basis)
        if not isinstance(basis, SharedDirections):
            raise TypeError("LoRA beside a side adapter is probed along SharedDirections, which must carry the whole "
                            f"answer, got {type(basis).__name__}")  # fmt: skip
        known = self._known(batch, anchor, multiplier, rows, basis)
        return known + self.projected(batch, multiplier, rows, basis, base).float()

    def _known(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        sizes, device = self._sizes(), self.optimizer.device
        gradients = torch.zeros(len(rows), sum(s.numel() for s in sizes), device=device)
        totals = [[flat.view(s) for flat, s in zip(row.split([s.numel() for s in sizes]), sizes)] for row in gradients]
        self._add_gradients_(totals, batch, anchor, multiplier, rows)
        return gradients if isinstance(basis, Dense) else torch.stack([basis.project(g) for g in totals])

    def _sizes(self) -> list[torch.Size]:
        """Of each tensor's known gradient; nothing is known of what is probed."""
        probed = self.optimizer.probed or set()
        return [torch.Size([0]) if i in probed else p.shape for i, p in enumerate(self.optimizer.parameters)]

    def check_probe(self, batch: Batch, z: Tensor, multiplier: Tensor, round: int = 0) -> None:
        """As of a forward-only client, where anything is probed."""
        if self.optimizer.probed:
            super().check_probe(batch, z, multiplier, round)

    def _add_gradients_(
        self, totals: list[list[Tensor]], batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice]
    ) -> None:
        """Add to each client's totals its gradient, tensor by tensor in manifest order."""

        def vjp(first: int, bottleneck: Bottleneck, h: Tensor) -> None:
            own = [self.numbers[id(p)] for p in bottleneck.parameters()]
            for total, r in zip(totals, rows):
                start, stop = max(r.start, first), min(r.stop, first + len(h))
                if start < stop:
                    part, factor = h[start - first : stop - first], multiplier[start:stop]
                    add_local_gradient_([total[i] for i in own], bottleneck, part, factor)

        if self.taps == "recompute":
            self._recompute(vjp, batch, len(multiplier))
        for bottleneck, h in anchor.kept:
            vjp(0, bottleneck, h)

    def _recompute(self, vjp: Vjp, batch: Batch, examples: int) -> None:
        # λ is held now: beside it half of the examples run in less than the whole forward took.
        width = -(-examples // 2)
        for first in range(0, examples, width):
            with self.ladder.watching(partial(vjp, first)):
                self.evaluate({name: tensor[first : first + width] for name, tensor in batch.items()})
