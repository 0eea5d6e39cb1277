"""The rule by which a client is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hosfl_lightning.advise.ranking import FREEZE, Finding, choose, gains, ranked


def finding(name: str, gain: Any, up: float = 100, backprop: bool = False, share: Any = (0.3, 0.2, 0.4)) -> Finding:
    costs = {"up_per_client_round": up, "client_peak_bytes": 1000}
    return Finding(name, backprop, None, 10, gain, share, 1.0, None, None, costs)


DEAR, CHEAP = finding("backprop", (0.30, 0.2, 0.4), backprop=True), finding("scalars", (0.21, 0.1, 0.3), up=10)
MIDDLE = finding("side", (0.28, 0.1, 0.3), up=50)


class TestChoice:
    def test_asks_least_among_those_that_gain_nearly_as_much(self) -> None:
        assert choose([DEAR, MIDDLE, CHEAP]) == "scalars"

    def test_is_no_client_that_gains_much_less(self) -> None:
        assert choose([DEAR, MIDDLE, finding("scalars", (0.19, 0.1, 0.3), up=10)]) == "side"

    def test_is_backprop_where_nothing_else_comes_near(self) -> None:
        assert choose([DEAR, finding("scalars", (0.1, 0.05, 0.2), up=10)]) == "backprop"

    def test_is_to_freeze_where_no_gain_is_told_from_zero(self) -> None:
        assert choose([finding("side", (0.3, -0.01, 0.5)), finding("diverged", None)]) == FREEZE

    def test_is_to_freeze_where_no_decrease_lies_below_the_cut(self) -> None:
        assert choose([finding("side", (0.3, 0.1, 0.5), share=(0.1, 0.0, 0.3))]) == FREEZE

    def test_the_table_begins_with_the_best(self) -> None:
        names = [one.name for one in ranked([finding("diverged", None), CHEAP, DEAR])]
        assert names == ["backprop", "scalars", "diverged"]


def full(loss: float) -> torch.Tensor:
    return torch.full((8,), loss, dtype=torch.float64)


def test_a_gain_shrinks_on_as_it_did() -> None:
    """From round 10 to 20 to a half, so from 20 to 80 to a quarter; the weaker client's by as much."""
    still, end = {10: full(2.0), 20: full(1.0)}, full(0.9)
    curves = {"strong": {10: full(1.2), 20: full(0.6)}, "weak": {10: full(2.0), 20: end}}
    found = gains(still, curves, rounds=80)
    assert found["strong"][0].item() == pytest.approx(0.4 / 4)
    assert found["weak"][0].item() == pytest.approx(0.1 / 4)
    assert gains(still, curves, rounds=20)["strong"][0].item() == pytest.approx(0.4)
