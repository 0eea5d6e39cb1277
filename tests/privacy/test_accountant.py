"""ε(δ) against computations that know nothing of the library."""

from __future__ import annotations

import builtins
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from hosfl_lightning.privacy.accountant import epsilon_of, noise_for

PHI = NormalDist().cdf


def gaussian_delta(noise: float, releases: int, epsilon: float) -> float:
    """``Φ(s/2 − ε/s) − e^ε Φ(−s/2 − ε/s)``, s = √T/σ (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    s = math.sqrt(releases) / noise
    return PHI(s / 2 - epsilon / s) - math.exp(epsilon) * PHI(-s / 2 - epsilon / s)


def convolved(noise: float, releases: int, delta: float) -> float:
    """The worse direction's ε: the privacy loss on a fine grid, its density convolved with itself by FFT."""
    step, half = 2e-4, 1 << 18
    x = np.linspace(-12 * noise, 12 * noise + 1, 1_000_001)
    without, canary = (np.exp(-0.5 * ((x - mean) / noise) ** 2) for mean in (0, 1))
    losses, found = step * np.arange(-half, half), []
    for density, sign in ((canary, 1), (without, -1)):
        places = np.rint(sign * (2 * x - 1) / (2 * noise**2) / step).astype(int) + half
        one = np.roll(np.bincount(places, density / density.sum(), 2 * half), -half)
        many = np.roll(np.fft.irfft(np.fft.rfft(one) ** releases, 2 * half), half).clip(0)
        low, high = 0.0, 50.0
        for _ in range(40):
            middle = (low + high) / 2
            above = losses > middle
            spent = float((many[above] * -np.expm1(middle - losses[above])).sum())
            low, high = (middle, high) if spent > delta else (low, middle)
        found.append(high)
    return max(found)


@pytest.mark.parametrize(("noise", "releases"), [(0.7, 1), (1.0, 1), (4.0, 100), (30.0, 200)])
def test_full_batches_agree_with_the_analytic_gaussian(noise: float, releases: int) -> None:
    epsilon = epsilon_of(noise, 1e-5, releases)
    assert gaussian_delta(noise, releases, epsilon) == pytest.approx(1e-5, rel=1e-4)
    assert noise_for(epsilon, releases, 1e-5) == pytest.approx(noise, rel=1e-6)


def test_many_agree_with_a_convolution_to_three_digits() -> None:
    assert epsilon_of(4.0, 1e-5, 50) == pytest.approx(convolved(4.0, 50, 1e-5), rel=1e-3)


def test_nothing_released_costs_nothing() -> None:
    assert epsilon_of(1.0, 1e-5, 0) == 0.0


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="dp_accounting")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"trainer.privacy needs dp_accounting.*'hosfl_lightning\[privacy\]'"):
        epsilon_of(1.25, 1e-5)
