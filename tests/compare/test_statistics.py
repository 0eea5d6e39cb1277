"""Against numbers reckoned by hand."""

from __future__ import annotations

import math

import pytest

from hosfl_lightning.compare.statistics import first_reaching, gap_closed, spread

FROZEN = {0: 3.0, 1: 3.2, 2: 3.4}
FIRST_ORDER = {0: 2.0, 1: 2.1, 2: 2.5}  # gaps of 1.0, 1.1, 0.9
METHOD = {0: 2.5, 1: 2.7, 2: 3.1}  # gains of 0.5, 0.5, 0.3


def test_the_gap_is_of_paired_means() -> None:
    found, why = gap_closed(METHOD, FROZEN, FIRST_ORDER)
    assert found is not None
    assert why == ""
    assert found["value"] == pytest.approx(1.3 / 3.0)
    assert found["seeds"] == [0, 1, 2]


def test_the_interval_is_that_of_all_27_resamples() -> None:
    """Their lowest are 222 and 122, their highest 001 and 000; the percentiles lie 0.65 and 0.35 between."""
    found, _ = gap_closed(METHOD, FROZEN, FIRST_ORDER)
    assert found is not None
    lowest, second, last, highest = 0.9 / 2.7, 1.1 / 2.9, 1.5 / 3.1, 1.5 / 3.0
    assert found["low"] == pytest.approx(lowest + 0.65 * (second - lowest))
    assert found["high"] == pytest.approx(last + 0.35 * (highest - last))


def test_pairs_stay_together() -> None:
    """Seeds far apart, the method always half-way: there is no doubt, however the seeds are drawn."""
    frozen = {seed: 10.0 * seed + 3 for seed in range(4)}
    found, _ = gap_closed(
        {seed: loss - 0.5 - seed / 10 for seed, loss in frozen.items()},
        frozen,
        {seed: loss - 1 - seed / 5 for seed, loss in frozen.items()},
    )
    assert found is not None
    assert (found["low"], found["value"], found["high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_many_seeds_are_drawn_and_drawn_the_same() -> None:
    losses = [{seed: base + seed % 3 / 10 for seed in range(9)} for base in (2.5, 3.0, 2.0)]
    assert gap_closed(*losses) == gap_closed(*losses)


def test_controls_are_0_and_1() -> None:
    for method, value in ((FROZEN, 0.0), (FIRST_ORDER, 1.0)):
        found, _ = gap_closed(method, FROZEN, FIRST_ORDER)
        assert found is not None
        assert (found["low"], found["value"], found["high"]) == pytest.approx((value,) * 3)


@pytest.mark.parametrize(
    ("first_order", "exists"),
    [({0: 2.9, 1: 3.0}, True), ({0: 2.9, 1: 3.165}, True), ({0: 2.9, 1: 3.168}, False), ({0: 3.1, 1: 3.3}, False)],
)
def test_no_gap_within_twice_the_standard_error(first_order: dict[int, float], exists: bool) -> None:
    """Of two gaps a > b twice the standard error is a − b, so that b must be above a third of a."""
    found, why = gap_closed({0: 2.0, 1: 2.0}, {0: 3.0, 1: 3.2}, first_order)
    assert (found is not None) is exists
    assert why.startswith("" if exists else "no gap here: frozen − first order is")


def test_only_seeds_that_all_have() -> None:
    found, _ = gap_closed({0: 2.5, 2: 3.1, 5: 0.0}, FROZEN, FIRST_ORDER)
    assert found is not None
    assert (found["seeds"], found["value"]) == ([0, 2], pytest.approx(0.8 / 1.9))
    assert gap_closed({1: 2.5}, FROZEN, FIRST_ORDER) == (None, "1 seed(s): no standard error")


def test_spread() -> None:
    assert spread([1.0, 2.0, 4.0]) == pytest.approx({"mean": 7 / 3, "sd": (7 / 3) ** 0.5})
    assert spread([1.5]) == {"mean": 1.5, "sd": None}
    assert spread([1.0, math.inf]) == {"mean": math.inf, "sd": None}
    assert spread([]) == {"mean": None, "sd": None}


def test_first_reaching() -> None:
    curve = [{"round": 0, "loss": 3.0}, {"round": 5, "loss": 2.0}, {"round": 10, "loss": 2.5}]
    assert first_reaching(curve, "loss", 2.5, "min") == 5
    assert first_reaching(curve, "loss", 2.0, "min") == 5
    assert first_reaching(curve, "loss", 1.9, "min") is None
    assert first_reaching(curve[1:], "loss", 2.2, "max") == 10
