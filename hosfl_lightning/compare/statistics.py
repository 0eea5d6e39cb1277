"""What a few seeds can say."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import mean, quantiles, stdev
from typing import Any

#: Up to so many resamples are enumerated; beyond, so many are drawn.
EXHAUSTIVE, DRAWN = 50_000, 10_000


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None of what cannot be known."""
    known = list(values)
    finite = all(map(math.isfinite, known))
    return {"mean": mean(known) if known else None, "sd": stdev(known) if len(known) > 1 and finite else None}


def gap_closed(
    method: Mapping[int, float], frozen: Mapping[int, float], first_order: Mapping[int, float]
) -> tuple[dict[str, Any] | None, str]:
    r"""``mean_s(frozen_s − method_s) / mean_s(frozen_s − first-order_s)``: share of the first-order gap recovered.

    With the 95 % percentile interval of a bootstrap over seeds, the three losses of a seed staying together. All
    resamples are enumerated where there are few, so the result is the same every time. Of three seeds the interval can
    be no wider than from the lowest to the highest: it shows the seeds, not what a fourth might do.

    Args:
        method: Loss by seed; seeds that all three have are used.
        frozen: As the method's.
        first_order: As the method's.

    Returns:
        ``value``, ``low``, ``high`` and ``seeds``, or None; and why there is none: fewer than two seeds, or a gap
        between the controls that is not above twice its standard error ``stdev_s / √n``.
    """
    seeds = sorted(method.keys() & frozen.keys() & first_order.keys())
    if len(seeds) < 2:
        return None, f"{len(seeds)} seed(s): no standard error"
    pairs = [(frozen[s] - method[s], frozen[s] - first_order[s]) for s in seeds]
    gaps = [gap for _, gap in pairs]
    error = stdev(gaps) / math.sqrt(len(gaps))
    if mean(gaps) <= 2 * error:
        return None, f"no gap here: frozen − first order is {mean(gaps):+.4f} with a standard error of {error:.4f}"
    ratios = [_ratio(sample) for sample in _resamples(pairs) if sum(gap for _, gap in sample) > 0]
    low, high = _interval(ratios)
    return {"value": _ratio(pairs), "low": low, "high": high, "seeds": seeds}, ""


def first_reaching(curve: Sequence[Mapping[str, float]], metric: str, value: float, mode: str) -> int | None:
    """The first validated round at which a metric is as good as ``value``; None: never."""
    sign = 1 if mode == "min" else -1
    return next((int(row["round"]) for row in curve if sign * row[metric] <= sign * value), None)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(gain for gain, _ in pairs) / sum(gap for _, gap in pairs)


def _resamples(pairs: Sequence[tuple[float, float]]) -> Iterable[Sequence[tuple[float, float]]]:
    if len(pairs) ** len(pairs) <= EXHAUSTIVE:
        return product(pairs, repeat=len(pairs))
    generator = random.Random(0)
    return (generator.choices(pairs, k=len(pairs)) for _ in range(DRAWN))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """2.5th and 97.5th percentile."""
    cuts = quantiles(values, n=40, method="inclusive")
    return cuts[0], cuts[-1]
