"""Squared norms, decreases and shares from batches' gradients: without bias, whatever the noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hosfl_lightning.advise.cosine import expected_cosine
from hosfl_lightning.advise.gradients import Rule, decreases, gram_of, noise_scale, resamples, shares, squared_norm
from hosfl_lightning.optim import SharedDirections

D, B, DRAWS = 40, 8, 3000
ONCE = torch.ones(1, B)


def noisy(mean: float, draws: int = DRAWS) -> Tensor:
    """``(draws, B, D)``: in every element that mean, and noise of variance 1."""
    return mean + torch.randn(draws, B, D, generator=torch.Generator().manual_seed(0))


class TestSquaredNorm:
    def test_has_no_bias(self) -> None:
        """Naively it would be ‖G‖² + tr Σ / B, thrice as much."""
        batches = noisy(0.25)
        found = torch.tensor([squared_norm(gram_of(one)) for one in batches])
        error = found.std() / math.sqrt(DRAWS)
        assert abs(found.mean() - D * 0.25**2) < 4 * error < 0.4
        assert batches.mean(1).square().sum(1).mean() > 2 * D * 0.25**2

    def test_nor_has_that_of_a_resample(self) -> None:
        """In which a batch stands twice, and would be correlated with itself."""
        counts = torch.tensor([3.0, 2, 1, 1, 1, 0, 0, 0])
        found = torch.tensor([squared_norm(gram_of(one), counts) for one in noisy(0.25)])
        assert abs(found.mean() - D * 0.25**2) < 4 * found.std() / math.sqrt(DRAWS)

    def test_gives_the_noise_scale(self) -> None:
        """n tr Σ / ‖G‖²."""
        one = 1 + torch.randn(400, D, generator=torch.Generator().manual_seed(1)) * 2
        assert noise_scale(one, examples=16) == pytest.approx(16 * 4, rel=0.1)
        assert noise_scale(torch.tensor([[1.0], [-1.0]]), 16) is None


class TestDecrease:
    @pytest.mark.parametrize("adaptive", [False, True])
    def test_of_pure_noise_is_none(self, adaptive: bool) -> None:
        found = torch.cat([decreases(one, Rule(adaptive, 0.1), ONCE) for one in noisy(0.0)])
        assert abs(found.mean()) < 4 * found.std() / math.sqrt(DRAWS)

    def test_of_sgd_is_the_rate_times_the_squared_norm(self) -> None:
        assert decreases(torch.full((B, D), 2.0), Rule(False, 0.1), ONCE).item() == pytest.approx(0.1 * 4 * D)

    def test_of_adam_is_the_rate_times_the_sum_of_magnitudes(self) -> None:
        assert decreases(torch.full((B, D), -2.0), Rule(True, 0.1), ONCE).item() == pytest.approx(0.1 * 2 * D)

    def test_an_optimizer_is_told_by_its_name(self) -> None:
        parameter = [torch.nn.Parameter(torch.zeros(1))]
        assert Rule.of(torch.optim.NAdam(parameter), 0.1).adaptive
        assert not Rule.of(torch.optim.SGD(parameter, lr=0.1), 0.1).adaptive


def test_resamples_keep_the_halves_apart() -> None:
    counts = resamples(10)
    assert counts[0].tolist() == [1] * 10
    assert set(counts[1:, ::2].sum(1).tolist()) == set(counts[1:, 1::2].sum(1).tolist()) == {5}
    assert (counts[1:] != 1).any()


def test_a_half_without_a_decrease_has_no_share() -> None:
    found = shares(torch.tensor([3.0, -1.0, -1.0]), torch.tensor([1.0, 2.0, -1.0]))
    assert found[:2].tolist() == [0.75, 0.0]
    assert found[2].isnan()


@pytest.mark.parametrize("distribution", ["rademacher", "gauss16"])
def test_the_cosine_is_that_of_real_directions(distribution: str) -> None:
    """E‖ĝ‖² over rounds."""
    gradient = torch.randn(6, generator=torch.Generator().manual_seed(0))
    squares = []
    for round in range(500):
        basis = SharedDirections(0, round, 2, distribution)
        [(_, _, estimate)] = basis.chunks([gradient], basis.project([gradient]))
        squares.append(float(estimate.square().sum()))
    expected = expected_cosine(2, 6, distribution)  # of signs 2/7, of normal directions 2/9
    assert float(gradient.square().sum() / torch.tensor(squares).mean()) == pytest.approx(expected**2, rel=0.1)
    assert expected_cosine(1, 1) == 1.0
