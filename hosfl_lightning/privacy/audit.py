"""Whether the noise is what the accountant was told: a canary, a likelihood ratio, and a bound that holds by count."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import beta

from hosfl_client.bfloat16 import Array

Release = Callable[[int, bool], float]
"""A number that says most of a release: of the trial with that number, with the canary or without."""
#: Of a canary, far beyond every clip.
LARGE = 1e6


class Canary:
    """Answers of an endpoint to the same question, in which one example's vector is as long as it may be, or nothing.

    At the client level the whole answer is the canary, and without it there is its opposite.

    Args:
        endpoint: A `hosfl_lightning.clients.SplitEndpoint` with privacy and simulated noise; its own data and code run.
        client: Whose answer.
        size: Coefficients of it.
    """

    def __init__(self, endpoint: Any, client: int = 0, size: int = 2) -> None:
        self.endpoint, self.client, self.size = endpoint, client, size
        self.cohort = endpoint.data([client], 0)

    def __call__(self, trial: int, present: bool) -> float:
        """The coefficient in which the canary is."""
        values = torch.zeros(len(self.endpoint.rows(self.cohort)), self.size)
        absent = 0.0 if self.endpoint.privacy.by_example else -LARGE
        values[0, 0] = LARGE if present else absent
        place = SimpleNamespace(round=2 * trial + present, attempt=0)
        return float(self.endpoint.released(self.cohort, values, place)[self.client][0])


def audit(release: Release, trials: int, delta: float, confidence: float = 0.99) -> float:
    r"""The least ε that so many releases with and without a canary allow, with that confidence.

    ::

        (ε, δ)-private   ⇒   P[s > τ | with] ≤ e^ε P[s > τ | without] + δ,   so for s ≤ τ, and so the other way round

    For Gaussian noise a threshold on the canary's coordinate *is* the likelihood ratio test, and no test is stronger.
    τ is chosen on the first half of the releases and the probabilities are bounded on the second (Clopper and Pearson),
    so that the choice has no part in the confidence.

    Args:
        release: Gives ``s``.
        trials: On each side.
        delta: δ.
        confidence: That ε is no less.

    Reference: Jagielski et al., Auditing differentially private machine learning, arXiv 2006.07709.
    """
    sides = [np.array([release(trial, present) for trial in range(trials)]) for present in (True, False)]
    first, second = ([side[part] for side in sides] for part in (slice(trials // 2), slice(trials // 2, None)))
    thresholds = np.quantile(np.concatenate(first), np.linspace(0, 1, 201))
    choices = [(tau, event) for tau in thresholds for event in range(4)]
    tau, event = max(choices, key=lambda one: _bound(first, one[0], one[1], delta, confidence))
    return max(0.0, _bound(second, tau, event, delta, confidence))


def _bound(sides: list[Array], tau: float, event: int, delta: float, confidence: float) -> float:
    """Of one of the four inequalities: bit 0 exchanges the sides, bit 1 the events."""
    likely, unlikely = [side > tau if event & 2 else side <= tau for side in sides[:: -1 if event & 1 else 1]]
    error = (1 - confidence) / 2
    least = _least(int(likely.sum()), len(likely), error) - delta
    most = 1 - _least(int((~unlikely).sum()), len(unlikely), error)
    return math.log(least / most) if least > 0 else -math.inf


def _least(successes: int, trials: int, error: float) -> float:
    """A probability is below this with ``error`` at most (Clopper and Pearson)."""
    return float(beta.ppf(error, successes, trials - successes + 1)) if successes else 0.0
