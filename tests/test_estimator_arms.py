"""What `benchmarks.estimators` compares are estimates of one gradient, at equal forwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.estimator_arms import ESTIMATORS, FORWARDS, Draw, Known, Term, exact

D, CLIENTS, BATCH = 12, 4, 3
#: Of the gradient's part within a subspace; two steps are a step and an estimate.
OTHERS = {"public subspace of 16", "two steps at one λ"}
FOUR_TIMES, EXACT = "32 signs (4 times the forwards)", "control: backprop, same values"


class Linear:
    """``f(θ, x) = x θ``, of which every estimate is exact along its directions; counts examples."""

    def __init__(self) -> None:
        self.examples = 0

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        self.examples += len(x)
        return x * theta


@pytest.fixture
def term() -> Term:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS * BATCH, D, generator=draw)
    theta = torch.zeros(D)
    return Term(Linear(), x, torch.randn(x.shape, generator=draw), x * theta, CLIENTS)


def known(momentum: Tensor) -> Known:
    return Known(momentum, torch.linalg.qr(torch.randn(D, 4, generator=torch.Generator().manual_seed(1)))[0].T, _step)


def _step(theta: Tensor, gradient: Tensor) -> Tensor:
    return theta - 0.01 * gradient


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - OTHERS))
def test_the_mean_is_the_gradient(name: str, term: Term) -> None:
    theta, draws = torch.zeros(D), 1 if name == EXACT else 1500
    wanted = exact(term, theta, Draw(D, torch.Generator()), known(torch.zeros(D)))
    held, draw = known(torch.ones(D)), Draw(D, torch.Generator().manual_seed(2))
    mean = torch.stack([ESTIMATORS[name](term, theta, draw, held) for _ in range(draws)]).mean(0)
    assert torch.linalg.vector_norm(mean - wanted) < 0.075 * torch.linalg.vector_norm(wanted)


def test_a_subspace_gives_the_part_within_it(term: Term) -> None:
    theta, held, draw = torch.zeros(D), known(torch.zeros(D)), Draw(D, torch.Generator().manual_seed(2))
    gradient = exact(term, theta, draw, held)
    wanted = held.subspace.T @ (held.subspace @ gradient)
    mean = torch.stack([ESTIMATORS["public subspace of 16"](term, theta, draw, held) for _ in range(1500)]).mean(0)
    assert torch.linalg.vector_norm(mean - wanted) < 0.075 * torch.linalg.vector_norm(wanted)
    assert torch.linalg.vector_norm(wanted - gradient) > 0.3 * torch.linalg.vector_norm(gradient)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {FOUR_TIMES, EXACT}))
def test_forwards_are_equal(name: str, term: Term) -> None:
    ESTIMATORS[name](term, torch.zeros(D), Draw(D, torch.Generator().manual_seed(2)), known(torch.ones(D)))
    assert isinstance(term.half, Linear)
    assert term.half.examples == FORWARDS * CLIENTS * BATCH
