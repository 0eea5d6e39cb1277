"""How well P random directions point along a gradient."""

from __future__ import annotations

import math


def expected_cosine(probes: int, dimensions: int, distribution: str = "rademacher") -> float:
    r"""``√(‖g‖² / E‖ĝ‖²)``, of ``ĝ = (1/P) Σ_p ⟨g, u_p⟩ u_p`` in d dimensions; about the mean of the cosine.

    ::

        E‖ĝ‖² / ‖g‖² = (d + P − 1) / P     signs, for ‖u‖² is d whatever u
                     = (d + P + 1) / P     normal directions

    Args:
        probes: ``P``.
        dimensions: ``d``.
        distribution: ``rademacher`` or ``gauss16``.
    """
    extra = -1 if distribution == "rademacher" else 1
    return math.sqrt(probes / (dimensions + probes + extra))
