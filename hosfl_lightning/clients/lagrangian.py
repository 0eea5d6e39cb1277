"""The Lagrangian's client term."""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements, and parts of z, that the term widens to fp64 at a time: scratch of 1 MiB or an eighth of fp32 z.
WIDENED, PARTS = 1 << 16, 32


def lagrangian_term(z: Tensor, multiplier: Tensor, rows: list[slice]) -> Tensor:
    r"""``⟨λ_k, z_k⟩`` for every client, ``(K,)`` fp64.

    A product of two floats of at most 24 significant bits is exact in fp64. So a probe may take the difference of two
    such sums, ``⟨λ, z_p⟩ − ⟨λ, z⟩``: it errs by about ``1e-16 Σ|λ z|``, a millionth of what z's own rounding does to it
    in fp32, and z need not be kept. The difference of two sums in z's precision is lost in their rounding.

    Features are summed first, then positions, then examples, so the order does not depend on threads.

    Args:
        z: ``f_c(x; θ')``, ``(B, S, h)``, fp32 or narrower.
        multiplier: λ, likewise.
        rows: Each client's examples.

    Reference: HO-SFL, arXiv 2603.14773, the Lagrangian's client term.
    """
    examples, positions, features = z.shape
    width = max(1, WIDENED // (examples * features), positions // PARTS)
    parts = zip(z.split(width, dim=1), multiplier.split(width, dim=1))
    tokens = torch.cat([part.double().mul_(factor).sum(-1) for part, factor in parts], dim=1)
    totals = tokens.sum(-1)
    return torch.stack([totals[r].sum() for r in rows])
