"""Answers that no rule can use are refused by name; the others go on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from hosfl_lightning.aggregation import LIMIT, Median, combine, screen
from hosfl_lightning.optim import Basis, Dense, SharedDirections, ZerothOrder
from hosfl_lightning.wire import ProjectedGradients

ROUND = 7
BASIS = SharedDirections(0, ROUND, 3)


def _answer(client: int, basis: Basis = BASIS) -> ProjectedGradients:
    return ProjectedGradients(ROUND, client, basis.describe(), torch.full((basis.size,), 0.5 + client), 4 + client)


def _with(client: int, probe: int, value: float) -> ProjectedGradients:
    answer = _answer(client)
    answer.coefficients[probe] = value
    return answer


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (_with(3, 1, math.nan), "coefficient 1 is nan"),
        (_with(3, 2, math.inf), "coefficient 2 is inf, beyond ±1e+06"),
        (_with(3, 0, -math.inf), "coefficient 0 is -inf, beyond ±1e+06"),
        (_with(3, 0, 1e9), "coefficient 0 is 1e+09, beyond ±1e+06"),
        (_with(3, 0, -1.5e6), "coefficient 0 is -1.5e+06, beyond ±1e+06"),
        (replace(_answer(3), round=6), "its answer is for round 6, this is round 7"),
        (
            replace(_answer(3), coefficients=torch.ones(4)),
            "it sent [4] coefficients, the round has [3]",
        ),
        (
            replace(_answer(3), basis=SharedDirections(0, ROUND, 3, "gauss16").describe()),
            "its answer is in the basis {'kind': 'shared_directions', 'probes': 3, 'distribution': "
            "'gauss16'}, the round's is {'kind': 'shared_directions', 'probes': 3, 'distribution': 'rademacher'}",
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_answer_is_refused_by_name_wherever_it_stands(bad: ProjectedGradients, reason: str, place: int) -> None:
    good = [_answer(1), _answer(5)]
    valid, refused = screen([*good[:place], bad, *good[place:]], ROUND, BASIS)
    assert valid == good  # the very objects
    assert refused == {3: reason}


def test_several_bad_clients_are_all_named() -> None:
    valid, refused = screen([_with(0, 0, math.nan), _with(4, 1, 1e9)], ROUND, BASIS)
    assert valid == []
    assert list(refused) == [0, 4]


def test_the_limit_itself_is_heard() -> None:
    assert LIMIT == 1e6
    assert screen([_with(0, 0, 1e6), _with(1, 0, -1e6)], ROUND, BASIS)[1] == {}
    assert list(screen([_with(0, 0, 2.0), _with(1, 0, 2.1)], ROUND, BASIS, limit=2.0)[1]) == [1]


def test_gradients_are_screened_as_well() -> None:
    basis = Dense([3, 2])
    broken = _answer(2, basis)
    broken.coefficients[4] = math.nan
    valid, refused = screen([_answer(1, basis), broken, _answer(3)], ROUND, basis)
    assert [answer.client for answer in valid] == [1]
    assert list(refused) == [2, 3]


@pytest.mark.parametrize("rule", [None, Median()])
def test_the_round_is_that_of_the_others(rule: Any) -> None:
    optimizer = ZerothOrder([torch.nn.Parameter(torch.zeros(4))], probes=3)
    good, chosen = [_answer(1), _answer(5)], {} if rule is None else {"rule": rule}
    valid, _ = screen([good[0], _with(2, 1, math.nan), good[1]], ROUND, BASIS)
    update, alone = combine(valid, optimizer, **chosen), combine(good, optimizer, **chosen)
    assert torch.equal(update.coefficients, alone.coefficients)
    assert update.participants == [1, 5]
    assert update.weights == [5 / 14, 9 / 14]
