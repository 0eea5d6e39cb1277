"""What the pictures show, read from the axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
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
    told = results(mode, good=good, wild=wild)
    (axes,) = drawn(told).axes
    low, high = axes.get_ylim()
    assert min(good, 4.0) - 1 < low < min(good, 4.0) < max(good, 4.0) < high < max(good, 4.0) + 1
    assert sorted(legend(axes)) == ["good", "wild (off the axis)"]


def test_without_a_metric_the_loss_falls_whatever_the_mode() -> None:
    told = results("max", good=1.0) | {"metric": None}
    for point in told["methods"]["good"]["curve"]:
        point["loss"] = point["m"]
    (axes,) = drawn(told, "loss").axes
    low, high = axes.get_ylim()
    assert low < 1.0 < 4.0 < high


def test_axes_of_logarithms_are_of_what_is_drawn_on_them_and_have_few_ticks() -> None:
    """The start has spent nothing, and is on no such axis."""
    told = results("min", good=1.0)
    told["methods"]["good"]["curve"].insert(1, {"round": 5, "m": dict.fromkeys(("low", "mean", "high"), 1.5)})
    for point, spent in zip(told["methods"]["good"]["curve"], (0, 3e6, 17e6)):
        point["bytes"] = spent
    figure = pictures.curves(told, pictures.style(told), "m", "bytes")
    assert figure is not None
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_ylim() == pytest.approx((0.87, 1.53))
    low, high = axes.get_xlim()
    labels = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert labels == ["5 MB", "10 MB"]
    assert not any(tick.label1.get_text() for tick in axes.xaxis.get_minor_ticks())


def test_a_row_without_a_finite_start_sets_no_axis() -> None:
    told = results("min", good=1.0, lost=2.0)
    told["methods"]["lost"]["curve"][0]["m"] = dict.fromkeys(("low", "mean", "high"), float("inf"))
    (axes,) = drawn(told).axes
    assert axes.get_ylim() == pytest.approx((0.74, 4.26))


@pytest.mark.parametrize(
    ("mode", "mean", "edge", "head"),
    [("min", 13.0, 13.1, "^"), ("max", -5.0, -5.1, "v"), ("min", float("inf"), float("inf"), "^"),
     ("min", 4.0, 9.0, "^"), ("max", 4.0, -3.0, "v")],
    ids=["up", "down", "infinite", "its band alone, up", "its band alone, down"],
)  # fmt: skip
def test_what_leaves_the_frame_has_an_arrow_head_where_it_does(mode: str, mean: float, edge: float, head: str) -> None:
    told = results(mode, good=1.0 if mode == "min" else 6.0, wild=mean)
    told["methods"]["wild"]["curve"][1]["m"]["high" if head == "^" else "low"] = edge
    (axes,) = drawn(told).axes
    (arrow,) = (line for line in axes.lines if line.get_marker() in ("^", "v", "<", ">"))
    begin, end = (4.1, axes.get_ylim()[1]) if head == "^" else (3.9, axes.get_ylim()[0])
    assert arrow.get_marker() == head and not arrow.get_clip_on()
    assert [*arrow.get_ydata()] == [end]
    assert [*arrow.get_xdata()] == pytest.approx([9 * (end - begin) / (edge - begin)])


def test_on_an_axis_of_logarithms_the_arrow_head_is_on_the_line() -> None:
    assert pictures._leaves([10, 1000], [0, 2], 1, 1, log=True) == pytest.approx(100)
    assert pictures._leaves([10, 1000], [0, 2], 1, 1, log=False) == pytest.approx(505)
    assert pictures._leaves([10, 1000], [0, 2], 3, 1, log=True) is None
    assert pictures._leaves([10, 1000], [2, 2], 1, 1, log=True) == 10


def test_markers_are_no_arrow_heads() -> None:
    assert not {*pictures.MARKERS} & {*"^v<>"}


@pytest.mark.parametrize(("count", "panels"), [(1, [3]), (6, [8]), (7, [5, 6]), (12, [6, 6, 6]), (13, [5, 5, 5, 6])])
def test_no_panel_has_more_than_eight_lines_and_each_has_the_controls(count: int, panels: list[int]) -> None:
    told = results("min", **{f"method {n}": 1.0 + n / 10 for n in range(count)}, frozen=2.0, first=1.5)
    told["methods"]["frozen"]["algorithm"], told["methods"]["first"]["algorithm"] = "Frozen", "SplitFedSGD"
    figure = drawn(told)
    names = [legend(axes) for axes in figure.axes]
    assert [len(one) for one in names] == panels
    assert all({"frozen", "first"} <= {*one} for one in names)
    assert {*told["methods"]} == {name for one in names for name in one}
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}) == 1


def test_rows_of_which_nothing_is_known_are_named_below() -> None:
    told = results("min", good=1.0, lost=2.0, gone=3.0)
    for name in ("lost", "gone"):
        told["methods"][name]["curve"] = []
    told["methods"]["good"] |= {"client_peak_bytes": 2**20, "client_inference_bytes": 2**19}
    figure, shown = drawn(told), pictures.bars(told, pictures.style(told))
    assert shown is not None
    assert [words(one) for one in (figure, shown)] == [
        "Without a line, as nothing is known on these axes: lost; gone.", "Without a bar, as it was not measured: "
        "lost; gone."
    ]  # fmt: skip
    assert words(drawn(results("min", good=1.0))) == ""


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    told = results("min", lost=1.0)
    told["methods"]["lost"]["curve"] = []
    assert pictures.draw(told, tmp_path) == {} and [*tmp_path.iterdir()] == []


def drawn(told: dict[str, Any], metric: str = "m") -> Figure:
    figure = pictures.curves(told, pictures.style(told), metric, "round")
    assert figure is not None
    return figure


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def words(figure: Figure) -> str:
    return figure.get_supxlabel().replace("\n", " ")
