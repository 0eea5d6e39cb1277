"""The client that never backpropagates."""

from __future__ import annotations

import math
import warnings
from statistics import fmean

import torch
from torch import Tensor, nn

from hosfl_lightning.clients.base import Anchor, SplitClient, freeze
from hosfl_lightning.clients.batched_probes import BatchedProbes, Size
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.lagrangian import lagrangian_term
from hosfl_lightning.optim import Basis, SharedDirections, ZerothOrder


class ForwardOnlyClient(SplitClient):
    r"""``v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩``: ``P + 1`` forwards a round at inference memory.

    Holds no server parameter, no graph, no ``.grad``; optimizer state only if the update rule has any. While it waits
    for λ it keeps z, in compute dtype, and its batch; during the probes λ in the place of z.

    Args:
        half: ``f_c``; its parameters stop asking for gradients.
        optimizer: `ZerothOrder` over θ_c with ``module=half``.
        probe_batch: Probes in one forward, or ``auto``: see `BatchedProbes`.

    Reference: HO-SFL, arXiv 2603.14773, client update.
    """

    #: None: probes go one by one, as on a half that takes no batch.
    batched: BatchedProbes | None = None

    def __init__(self, half: nn.Module, optimizer: ZerothOrder, probe_batch: Size = 1) -> None:
        super().__init__(half, optimizer)
        freeze(half)
        self.batched = BatchedProbes(half, optimizer, probe_batch)

    @torch.no_grad()
    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """``z = f_c(x; θ_c)``, no graph."""
        return Anchor(self.evaluate(batch))

    @torch.no_grad()
    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """``(K, P)`` projected gradients, fp32, of ``SharedDirections``; releases the anchor's z."""
        if not isinstance(basis, SharedDirections):
            raise TypeError(f"ForwardOnlyClient answers in SharedDirections, got {type(basis).__name__}")
        return self.projected(batch, multiplier, rows, basis, anchor.release(multiplier, rows)).float()

    def projected(
        self, batch: Batch, multiplier: Tensor, rows: list[slice], basis: SharedDirections, base: Tensor
    ) -> Tensor:
        """``(K, P)`` projected gradients of the Lagrangian terms by forwards, fp64; ``base`` are the terms at θ_c."""

        def term(z: Tensor) -> Tensor:
            return lagrangian_term(z, multiplier, rows)

        values = None if self.batched is None else self.batched.project(self.evaluate, term, batch, basis, base)
        if values is None:
            values = self.optimizer.project(lambda: term(self.evaluate(batch)), basis=basis, base=base)
        return values.T

    @torch.no_grad()
    def probe(self, batch: Batch, basis: SharedDirections, probe: int, scale: float) -> Tensor:
        """``f_c(x; θ_c + scale · u_probe)``."""
        with self.optimizer.perturbed(basis, probe, scale):
            return self.evaluate(batch)

    @torch.no_grad()
    def check_probe(self, batch: Batch, z: Tensor, multiplier: Tensor, round: int = 0) -> None:
        r"""Warn when μ is lost in rounding or so large that the two sides of a probe disagree.

        Along four directions: the share of z's non-zero elements that change under a probe, and the root mean square of
        ``t₊ + t₋`` over that of ``max(|t₊|, |t₋|)``, for the changes ``t±`` of the Lagrangian term at ``θ ± μu``; zero
        where ``f_c`` is linear. A single direction may lie almost across the gradient and would cry wolf.
        """
        if not self.optimizer.estimator.smoothed:
            return
        mu, everything = self.optimizer.mu, [slice(0, len(z))]
        basis = self.optimizer.basis(round, probes=4)
        base = lagrangian_term(z, multiplier, everything)
        shares, sums, largest = [], [], []
        for probe in range(basis.size):
            sides = []
            for scale in (-mu, mu):
                moved = self.probe(batch, basis, probe, scale)
                sides.append(float(lagrangian_term(moved, multiplier, everything) - base))
            # Elements that are zero on both sides (behind a ReLU) could not move and are not counted.
            alive = (moved != 0) | (z != 0)
            shares.append(float((moved != z).sum() / alive.sum().clamp(min=1)))
            sums.append(sum(sides))
            largest.append(max(map(abs, sides)))
        share = fmean(shares)
        disagreement = math.hypot(*sums) / (math.hypot(*largest) or 1.0)
        if share < 0.5:
            warnings.warn(
                f"mu={mu:g} changes only {share:.0%} of the smashed data's elements at {z.dtype}: the probes "
                "measure rounding; raise mu, or run the client half in a wider dtype",
                stacklevel=2,
            )
        elif disagreement > 0.25 and not self.optimizer.estimator.symmetric:
            warnings.warn(
                f"the two sides of a probe disagree by {disagreement:.0%} at mu={mu:g}: rounding (raise mu) or "
                "curvature (lower mu), or set estimator: central",
                stacklevel=2,
            )
