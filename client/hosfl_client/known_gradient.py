"""The exact gradient of a side adapter at a client: λ, and one more forward for the layers' outputs."""

from __future__ import annotations

import numpy as np

from hosfl_client.bfloat16 import Array, Floats
from hosfl_client.codecs import Coded
from hosfl_client.half import Batch, Half
from hosfl_client.lagrangian import multiplier_of
from hosfl_client.manifest import Manifest
from hosfl_client.side import Bottleneck


def known_gradient(
    half: Half, manifest: Manifest, batch: Batch, multiplier: Coded, mask: Array, example: int | None = None
) -> list[Floats]:
    r"""``∂⟨λ, z⟩/∂θ_i`` of the bottlenecks, fp32, in manifest order; empty for what else is trained.

    Half of the examples run at a time: beside λ the outputs of all tapped layers are held.

    Args:
        half: ``f_c``, with a side adapter.
        manifest: Of the half.
        batch: As it went into the forward.
        multiplier: λ at the valid positions, as it travelled.
        mask: Valid positions, ``(B, S)`` bool.
        example: Of that one alone; None: of all.
    """
    theta = half.parameters()
    known = {name for rung in manifest.side for name in (rung.down, rung.up)}
    totals = {name: np.zeros(p.shape if name in known else 0, np.float32) for name, p in theta.items()}
    start, stop = (0, len(mask)) if example is None else (example, example + 1)
    width = -(-(stop - start) // 2)
    for first in range(start, stop, width):
        last = min(first + width, stop)
        taps = half.tapped({name: array[first:last] for name, array in batch.items()})[1]
        factor = multiplier_of(multiplier, mask, first, last)
        for rung in manifest.side:
            bottleneck = Bottleneck(theta[rung.down], theta[rung.up], rung.pooled)
            bottleneck.add_gradient((totals[rung.down], totals[rung.up]), taps.pop(0), factor)
    return [*totals.values()]
