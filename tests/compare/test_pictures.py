"""What the pictures show, read from the axes."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from hosfl_lightning.compare import pictures


def results(mode: str, **ends: float) -> dict[str, Any]:
    def point(round: int, value: float) -> dict[str, Any]:
        return {"round": round, "m": {"low": value - 0.1, "mean": value, "high": value + 0.1}}

    rows = {
        name: {"algorithm": "HOSFL", "curve": [point(0, 4.0), point(9, end)]} for name, end in ends.items()
    }  # fmt: skip
    return {"metric": "m", "mode": mode, "methods": rows}


@pytest.mark.parametrize(("mode", "good", "wild"), [("min", 1.0, 1e6), ("max", 6.0, -1e6), ("min", 1.0, float("nan"))])
def test_a_row_that_diverged_leaves_the_axes_and_is_named(mode: str, good: float, wild: float) -> None:
    axes, told = Figure().add_subplot(), results(mode, good=good, wild=wild)
    pictures._curves(axes, told, pictures.style(told), "m", "round")
    low, high = axes.get_ylim()
    assert min(good, 4.0) - 1 < low < min(good, 4.0) < max(good, 4.0) < high < max(good, 4.0) + 1
    legend = axes.get_legend()
    assert legend is not None
    assert sorted(text.get_text() for text in legend.get_texts()) == ["good", "wild (off the axis)"]


def test_without_a_metric_the_loss_falls_whatever_the_mode() -> None:
    axes, told = Figure().add_subplot(), results("max", good=1.0) | {"metric": None}
    for point in told["methods"]["good"]["curve"]:
        point["loss"] = point["m"]
    pictures._curves(axes, told, pictures.style(told), "loss", "round")
    low, high = axes.get_ylim()
    assert low < 1.0 < 4.0 < high


def test_a_row_without_a_finite_start_sets_no_axis() -> None:
    axes, told = Figure().add_subplot(), results("min", good=1.0, lost=2.0)
    told["methods"]["lost"]["curve"][0]["m"] = dict.fromkeys(("low", "mean", "high"), float("inf"))
    pictures._curves(axes, told, pictures.style(told), "m", "round")
    assert axes.get_ylim() == pytest.approx((0.74, 4.26))
