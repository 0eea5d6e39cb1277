"""ε(δ) of Gaussian releases, by Google's dp-accounting."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from hosfl_lightning.privacy.extra import privacy_extra


@lru_cache(maxsize=4096)
def epsilon_of(noise: float, delta: float, releases: int = 1, probability: float = 1.0) -> float:
    r"""The least ε with which ``releases`` of a Gaussian mechanism are (ε, δ)-private, in both directions.

    ::

        probability 1    δ = Φ(s/2 − ε/s) − e^ε Φ(−s/2 − ε/s),  s = √releases / noise        exact
        below            the privacy loss of (1−q) N(0, σ²) + q N(1, σ²) against N(0, σ²), composed by dp-accounting
                         in a grid, rounded up

    Neighbours: one record, or one that adds nothing in its place (``REPLACE_SPECIAL``).

    Args:
        noise: Standard deviation over sensitivity.
        delta: δ.
        releases: How many.
        probability: q, with which a record has a part in each, independently of the others (Poisson sampling), where
            nobody sees which.
    """
    if not releases:
        return 0.0
    with privacy_extra():
        from dp_accounting import gaussian_mechanism
    if probability == 1.0:
        return float(gaussian_mechanism.get_epsilon_gaussian(noise / releases**0.5, delta))
    return float(_composed(noise, releases, probability).get_epsilon(delta))


def noise_for(epsilon: float, releases: int, delta: float, probability: float = 1.0) -> float:
    """The least noise over sensitivity with which ``releases`` are (ε, δ)-private.

    Args:
        epsilon: ε.
        releases: As in `epsilon_of`.
        delta: As in `epsilon_of`.
        probability: As in `epsilon_of`.
    """
    with privacy_extra():
        import dp_accounting
    if probability == 1.0:
        return float(dp_accounting.gaussian_mechanism.get_sigma_gaussian(epsilon, delta)) * releases**0.5
    bracket = dp_accounting.LowerEndpointAndGuess(0.2, 2.0)
    found = dp_accounting.calibrate_dp_mechanism(
        _accountant, lambda noise: _event(noise, releases, probability), epsilon, delta, bracket, tol=1e-4
    )
    return float(found)


def _accountant() -> Any:
    from dp_accounting import NeighboringRelation, pld

    return pld.PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)


def _event(noise: float, releases: int, probability: float) -> Any:
    import dp_accounting as dp

    one = dp.PoissonSampledDpEvent(probability, dp.GaussianDpEvent(noise))
    return dp.SelfComposedDpEvent(one, releases)


def _composed(noise: float, releases: int, probability: float) -> Any:
    return _accountant().compose(_event(noise, releases, probability))
