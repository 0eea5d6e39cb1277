"""ε(δ) of Gaussian releases, by Google's dp-accounting."""

from __future__ import annotations

import math
from typing import Any

from hosfl_lightning.privacy.extra import privacy_extra


def epsilon_of(noise: float, delta: float, releases: int = 1) -> float:
    r"""The least ε with which so many releases of a Gaussian mechanism are (ε, δ)-private together, exactly.

    ::

        δ = Φ(s/2 − ε/s) − e^ε Φ(−s/2 − ε/s),   s = √releases / noise

    T adaptive releases at σ are as one at ``σ/√T``. Nothing is claimed for who is in a minibatch.

    Args:
        noise: Standard deviation over sensitivity.
        delta: δ.
        releases: How many.

    Reference: Balle and Wang, Improving the Gaussian mechanism, arXiv 1805.06530, theorem 8.
    """
    return float(_library().get_epsilon_gaussian(noise / math.sqrt(releases), delta)) if releases else 0.0


def noise_for(epsilon: float, releases: int, delta: float) -> float:
    """The least noise over sensitivity with which so many releases are (ε, δ)-private together.

    Args:
        epsilon: ε.
        releases: How many.
        delta: δ.
    """
    return float(_library().get_sigma_gaussian(epsilon, delta)) * math.sqrt(releases)


def _library() -> Any:
    with privacy_extra():
        from dp_accounting import gaussian_mechanism
    return gaussian_mechanism
