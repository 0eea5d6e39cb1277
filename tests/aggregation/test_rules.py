"""What every rule keeps, and what the robust ones keep when a client lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from statistics import median
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from hosfl_lightning.aggregation import (
    AggregationRule,
    Median,
    NormClippedMean,
    TrimmedMean,
    WeightedMean,
    weighted_mean,
    weights,
)

CLIPPED = NormClippedMean(4.0)
RULES = [WeightedMean(), Median(), TrimmedMean(0.2), TrimmedMean(0.0), CLIPPED]
#: With the number of bad clients among K that the rule bears.
ROBUST = [(Median(), lambda k: math.ceil(k / 2) - 1), (TrimmedMean(0.25), lambda k: k // 4)]

every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def _clients(clients: int, probes: int = 40, seed: int = 0) -> tuple[Tensor, list[float]]:
    """Coefficients of clients of different sizes, with ties."""
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(clients, probes, generator=generator).mul_(4).round_().div_(3)
    return coefficients, weights(torch.randint(1, 5, (clients,), generator=generator).tolist())


def _permuted(coefficients: Tensor, shares: Sequence[float], seed: int) -> tuple[Tensor, list[float]]:
    order = torch.randperm(len(shares), generator=torch.Generator().manual_seed(seed))
    return coefficients[order], [shares[k] for k in order]


@every_rule
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 10, 100])
def test_copies_of_one_client_give_what_it_gives_alone(rule: AggregationRule, clients: int) -> None:
    one = torch.randn(1, 40, generator=torch.Generator().manual_seed(clients))
    shares = weights(range(1, clients + 1))
    mean = rule(one.expand(clients, -1), shares)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, rule(one, [1.0]))
    if rule is not CLIPPED:
        assert torch.equal(mean, one[0])


@every_rule
def test_the_order_of_the_clients_does_not_matter(rule: AggregationRule) -> None:
    """To the last bit where values are sorted, to rounding where they are summed in client order."""
    for seed in range(20):
        coefficients, shares = _clients(9, seed=seed)
        expected = rule(coefficients, shares)
        actual = rule(*_permuted(coefficients, shares, seed))
        if isinstance(rule, Median | TrimmedMean):
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@every_rule
def test_a_client_of_weight_zero_does_not_matter(rule: AggregationRule) -> None:
    coefficients, shares = _clients(5)
    silent = torch.full((2, 40), 1e5)
    assert torch.equal(rule(torch.cat([silent, coefficients]), [0.0, 0.0, *shares]), rule(coefficients, shares))


@every_rule
def test_arguments_are_checked_and_not_changed(rule: AggregationRule) -> None:
    coefficients, shares = _clients(5)
    before = coefficients.clone()
    rule(coefficients, shares)
    assert torch.equal(coefficients, before)
    with pytest.raises(ValueError, match="each of 4 weights"):
        rule(coefficients, shares[:4])
    with pytest.raises(TypeError, match="bfloat16"):
        rule(coefficients.bfloat16(), shares)
    for value in (float("nan"), float("inf"), 1e200):
        wide = coefficients.double()
        wide[3, 1] = value
        with pytest.raises(ValueError, match=r"client row 3 .* probe 1 is"):
            rule(wide, shares)


def test_the_mean_is_the_weighted_mean_to_the_last_bit() -> None:
    coefficients, shares = _clients(11)
    assert torch.equal(WeightedMean()(coefficients, shares), weighted_mean(coefficients, shares))


@pytest.mark.parametrize("clients", [1, 2, 3, 6, 9])
def test_the_median_counts_heads(clients: int) -> None:
    coefficients, shares = _clients(clients)
    expected = torch.tensor([median(column) for column in coefficients.double().T.tolist()]).float()
    assert torch.equal(Median()(coefficients, shares), expected)


@pytest.mark.parametrize(("fraction", "clients", "dropped"), [(0.2, 9, 1), (0.2, 4, 0), (0.49, 7, 3), (0.3, 10, 3)])
def test_the_trimmed_mean_is_the_weighted_mean_of_what_is_kept(fraction: float, clients: int, dropped: int) -> None:
    coefficients, shares = _clients(clients)
    actual = TrimmedMean(fraction)(coefficients, shares)
    for probe in range(coefficients.shape[1]):
        pairs = sorted(zip(coefficients[:, probe].tolist(), shares, strict=True))[dropped : clients - dropped]
        exact = sum(Fraction(v) * Fraction(w) for v, w in pairs) / sum(Fraction(w) for _, w in pairs)
        assert actual[probe].item() == pytest.approx(float(exact), rel=1e-7, abs=1e-12)


def test_the_fraction_is_the_decimal_that_was_written() -> None:
    """0.29 * 100 is 28.999999999999996; with 29 dropped at each end no outlier is left."""
    coefficients = torch.cat([torch.full((29, 1), 1e5), torch.ones(71, 1)])
    assert TrimmedMean(0.29)(coefficients, [0.01] * 100).item() == 1.0


def test_the_clipped_mean_is_the_mean_of_shortened_clients() -> None:
    coefficients = torch.tensor([[3.0, 4.0], [30.0, -40.0], [0.0, 1.0]])
    expected = torch.tensor([0.5 * 2.4 + 0.25 * 2.4, 0.5 * 3.2 - 0.25 * 3.2 + 0.25])
    torch.testing.assert_close(NormClippedMean(4.0)(coefficients, [0.5, 0.25, 0.25]), expected)
    # Long enough for all: not touched at all.
    assert torch.equal(
        NormClippedMean(50.0)(coefficients, [0.5, 0.25, 0.25]), weighted_mean(coefficients, [0.5, 0.25, 0.25])
    )


def test_the_norm_does_not_depend_on_how_it_is_summed() -> None:
    """Two clients that cancel, if the first one's norm is the root of the exact sum of squares, rounded once."""
    for seed in range(20):
        row = torch.randn(3000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        norm = math.sqrt(float(sum(Fraction(v * v) for v in row.tolist())))
        clipped = torch.stack([row, row * (4.0 / norm) * -0.5])
        assert not CLIPPED(clipped, [0.5, 1.0]).any()


@pytest.mark.parametrize(("rule", "borne"), ROBUST, ids=["median", "trimmed"])
@pytest.mark.parametrize("clients", [4, 5, 8, 12])
def test_bad_clients_leave_the_result_between_two_honest_ones(rule: AggregationRule, borne: Any, clients: int) -> None:
    for seed in range(10):
        coefficients, shares = _clients(clients, seed=seed)
        bad = borne(clients)
        assert bad > 0
        signs = torch.randn(bad, 40, generator=torch.Generator().manual_seed(seed)).sign()
        honest = coefficients[bad:]
        for attack in (torch.full((bad, 40), 1e5), torch.full((bad, 40), -1e5), signs * 1e5):
            result = rule(torch.cat([attack, honest]), shares)
            assert bool(((honest.amin(0) <= result) & (result <= honest.amax(0))).all())


@pytest.mark.parametrize(("rule", "borne"), ROBUST, ids=["median", "trimmed"])
def test_one_more_bad_client_breaks_it(rule: AggregationRule, borne: Any) -> None:
    coefficients, shares = _clients(8)
    coefficients[: borne(8) + 1] = 1e5
    assert rule(coefficients, shares).min() > 100


def test_a_bad_client_claiming_many_terms_does_not_own_the_median() -> None:
    coefficients = torch.tensor([[1e5], [1.0], [1.1]])
    assert Median()(coefficients, weights([10**9, 1, 1])).item() == pytest.approx(1.1)


def test_clipping_bounds_the_result_and_what_one_client_does_to_it() -> None:
    for seed in range(10):
        coefficients, shares = _clients(7, seed=seed)
        before = CLIPPED(coefficients, shares)
        assert before.norm() <= 4.0 * (1 + 1e-6)
        for attack in (1e5, -1e5):
            bent = CLIPPED(torch.cat([torch.full((1, 40), attack), coefficients[1:]]), shares)
            assert bent.norm() <= 4.0 * (1 + 1e-6)
            assert 0 < (bent - before).norm() <= 2 * shares[0] * 4.0 * (1 + 1e-6)
        all_bad = CLIPPED(torch.full((7, 40), 1e30), shares)
        assert all_bad.norm().item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TrimmedMean(0.5), r"fraction must be in \[0, 0.5\), got 0.5"),
        (lambda: TrimmedMean(-0.1), "fraction"),
        (lambda: TrimmedMean(math.nan), "fraction"),
        (lambda: NormClippedMean(0.0), "max_norm must be > 0 and finite, got 0.0"),
        (lambda: NormClippedMean(math.inf), "max_norm"),
        (lambda: NormClippedMean(math.nan), "max_norm"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [({"fraction": 0.2}, TrimmedMean(0.2)), ({"max_norm": 2.0}, NormClippedMean(2.0)), ({}, Median())],
)
def test_a_recipe_names_a_rule(init_args: dict[str, float], expected: AggregationRule) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--aggregation", type=AggregationRule)
    chosen = {"class_path": f"hosfl_lightning.aggregation.{type(expected).__name__}", "init_args": init_args}
    config = parser.parse_object({"aggregation": chosen})
    assert parser.instantiate(config).aggregation == expected
