"""How much an attack has recovered, beside the trivial guess."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

#: Resamples of a bootstrap; standard normal quantile of 95 %.
RESAMPLES, Z95 = 1000, 1.959964


class NotApplicableError(ValueError):
    """The attack has nothing to work on in this run; the message says what it lacks."""


@dataclass(frozen=True)
class Score:
    """One row of the report.

    Attributes:
        attack: Its name.
        measure: What is counted.
        value: Recovered.
        low: Of the 95 % interval, over examples.
        high: As ``low``.
        trivial: What the trivial guess recovers.
        count: Examples.
        note: What else must be known, in a few words.
    """

    attack: str
    measure: str
    value: float
    low: float
    high: float
    trivial: float
    count: int
    note: str = ""

    @classmethod
    def of(
        cls, attack: str, measure: str, values: Sequence[float], trivial: Sequence[float] | float, note: str = ""
    ) -> Score:
        """From one value an example, and of the trivial guess likewise or its mean."""
        low, high = interval(values)
        mean = trivial if isinstance(trivial, float) else fmean(trivial)
        return cls(attack, measure, fmean(values), low, high, mean, len(values), note)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 %: a bootstrap's percentiles over examples; Wilson's where all are 0 or all are 1."""
    if set(values) in ({0.0}, {1.0}):
        return wilson(sum(values), len(values))
    generator = random.Random(0)
    cuts = quantiles((fmean(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)), n=40)
    return cuts[0], cuts[-1]


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share ``hits / count``."""
    share, z2 = hits / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def exact(truth: Sequence[int], guess: Sequence[int]) -> float:
    """Share of positions whose token is the true one."""
    return fmean(float(a == b) for a, b in zip(truth, guess, strict=True))


def rouge_l(truth: Sequence[int], guess: Sequence[int]) -> float:
    """``F1`` of the longest common subsequence, over tokens."""
    row = [0] * (len(guess) + 1)
    for a in truth:
        diagonal = 0
        for j, b in enumerate(guess, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(truth) + len(guess))


def commonest(values: Iterable[int]) -> int:
    """The most frequent one."""
    return Counter(values).most_common(1)[0][0]


def tokens(
    attack: str, truths: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]], usual: int, note: str = ""
) -> list[Score]:
    """Tokens recovered exactly, and ROUGE-L; the trivial guess is the same usual token everywhere."""
    blank = [[usual] * len(truth) for truth in truths]
    return [
        Score.of(attack, name, [*map(measure, truths, guesses)], [*map(measure, truths, blank)], note)
        for name, measure in (("tokens", exact), ("ROUGE-L", rouge_l))
    ]


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """``P(member > other) + ½ P(=)``."""
    return fmean((a > b) + 0.5 * (a == b) for a in members for b in others)


def auc_score(
    attack: str, members: Sequence[float], others: Sequence[float], trivial: float = 0.5, note: str = ""
) -> Score:
    """AUC with a bootstrap over both sides."""
    generator = random.Random(0)

    def again() -> float:
        return auc(generator.choices(members, k=len(members)), generator.choices(others, k=len(others)))

    cuts = quantiles((again() for _ in range(RESAMPLES // 5)), n=40)
    return Score(attack, "AUC", auc(members, others), cuts[0], cuts[-1], trivial, len(members) + len(others), note)
