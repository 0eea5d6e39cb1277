from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hosfl_lightning.aggregation import weighted_mean, weights


def _coefficients(clients: int, probes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** torch.randint(-6, 6, (clients, probes), generator=generator)
    return torch.randn(clients, probes, generator=generator) * magnitude


def _oracle(coefficients: Tensor, shares: Sequence[float]) -> list[float]:
    """The stated order in Python floats: client 0 first, product and sum rounded to float64 each."""
    sums = [0.0] * coefficients.shape[1]
    for row, share in zip(coefficients.tolist(), shares, strict=True):
        sums = [total + value * share for total, value in zip(sums, row, strict=True)]
    return sums


def test_weights_are_shares_of_the_loss_terms() -> None:
    assert weights([1, 3]) == [0.25, 0.75]
    assert weights([7, 0, 14]) == [7 / 21, 0.0, 14 / 21]
    assert weights([5]) == [1.0]
    assert sum(weights(range(1, 100))) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("counts", "match"), [([3, -1], r"num_terms\[1\] is -1"), ([0, 0], "no client"), ([], "no client")]
)
def test_counts_that_give_no_weights_are_refused(counts: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        weights(counts)


@pytest.mark.parametrize("clients", [1, 2, 3, 7, 10, 49, 1000])
def test_copies_of_one_client_are_that_client_exactly(clients: int) -> None:
    one = _coefficients(1, 64)
    mean = weighted_mean(one.expand(clients, -1), weights([13] * clients))
    assert mean.dtype == torch.float32
    assert torch.equal(mean, one[0])


def test_unequal_clients_are_the_mean_over_all_terms() -> None:
    counts = [1, 4, 0, 11]
    coefficients = _coefficients(4, 32)
    mean = weighted_mean(coefficients, weights(counts))
    for probe in range(32):
        exact = sum(Fraction(n) * Fraction(v) for n, v in zip(counts, coefficients[:, probe].tolist(), strict=True))
        assert mean[probe].item() == pytest.approx(float(exact / sum(counts)), rel=1e-7)


def test_summed_in_client_order_in_float64() -> None:
    """A sum whose result is nothing but rounding tells the order: any other one leaves another remainder."""
    tiny = 2.0**-53
    assert weighted_mean(torch.tensor([[tiny], [tiny], [1.0], [-1.0]]), [1.0] * 4).item() == 2 * tiny
    assert weighted_mean(torch.tensor([[1.0], [tiny], [tiny], [-1.0]]), [1.0] * 4).item() == 0.0
    for seed in range(20):
        coefficients = _coefficients(37, 50, seed)
        shares = weights(range(1, 38))
        remainder = [-value for value in _oracle(coefficients, shares)]
        coefficients = torch.cat([coefficients.double(), torch.tensor([remainder], dtype=torch.float64)])
        assert not weighted_mean(coefficients, [*shares, 1.0]).any()


def test_float64_coefficients_are_not_rounded_before_the_sum() -> None:
    coefficients = torch.tensor([[1.0 + 2.0**-40], [-1.0]], dtype=torch.float64)
    assert weighted_mean(coefficients, [0.5, 0.5]).item() == 2.0**-41


def test_arguments_are_not_changed() -> None:
    coefficients = _coefficients(3, 4).double()
    before = coefficients.clone()
    weighted_mean(coefficients, weights([1, 2, 3]))
    assert torch.equal(coefficients, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_client_with_a_coefficient_that_is_not_finite_is_named(value: float) -> None:
    coefficients = _coefficients(5, 3).double()
    coefficients[3, 1] = value
    with pytest.raises(ValueError, match=r"client row 3 .* probe 1 is"):
        weighted_mean(coefficients, [0.25, 0.25, 0.25, 0.0, 0.25])


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="each of 3 weights"):
        weighted_mean(torch.ones(2, 4), [0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="K, P"):
        weighted_mean(torch.ones(2), [0.5, 0.5])
    with pytest.raises(ValueError, match="0 weights"):
        weighted_mean(torch.ones(0, 4), [])
    with pytest.raises(TypeError, match="bfloat16"):
        weighted_mean(torch.ones(1, 4, dtype=torch.bfloat16), [1.0])
