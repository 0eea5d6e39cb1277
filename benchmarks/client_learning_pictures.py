"""The pictures of ``benchmarks.client_learning``: gap closed by cell and method, and over what it costs a client."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from benchmarks.client_learning_cells import FIRST_ORDER, FROZEN
from benchmarks.client_learning_overview import title
from hosfl_lightning.compare.pictures import style

#: Of every axis of gap closed, in per cent; what lies beyond is an arrow with its number.
LIMITS = (-60.0, 220.0)
#: Costs this near to each other, by the logarithm of their ratio, would have one number over the other.
NEAR = 0.3
#: Rows of a cell of the usual height.
FEW = 6
LOOK: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
COSTS = {
    "client_forward_equivalents": "client arithmetic a round, in plain forwards of its half (log scale)",
    "bytes_up": "bytes up a client-round (log scale)",
}


def draw(rows: Iterable[dict[str, Any]], settings: dict[str, dict[str, Any]], out: Path) -> None:
    """Write the pictures, if any row has closed a part of a gap.

    Args:
        rows: Of ``client_learning.json``.
        settings: Every method by name, in the order of the picture; its ``algorithm`` says which are controls.
        out: Folder of ``gap_closed.png`` and ``gap_closed_over_*.png``.
    """
    rows = [*rows]
    known = [row for row in rows if row["gap_closed"] is not None]
    if not known:
        return
    kinds = {name: {"algorithm": one["algorithm"]["class_path"].rpartition(".")[2]} for name, one in settings.items()}
    styles = {name: {"color": one["color"], "marker": one["marker"] or "s"}
              for name, one in style({"methods": kinds}).items()}  # fmt: skip
    with matplotlib.rc_context(LOOK):
        by_cell(rows, styles).savefig(out / "gap_closed.png")
        for cost, label in COSTS.items():
            over(known, styles, cost, label).savefig(out / f"gap_closed_over_{cost}.png")


def by_cell(rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> Figure:
    """A band a cell, a dot a method in it with its interval; the controls are 0 and 100."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(title(row), {})[row["method"]] = row
    names = [n for n in styles if n not in (FROZEN, FIRST_ORDER) and any(n in found for found in cells.values())]
    figure = _figure(10.5, 1.3 + 0.42 * len(cells) + 0.24 * sum(len(found) > FEW for found in cells.values()))
    axes, top, ticks = figure.subplots(), 0.0, []
    for found in cells.values():
        shown = [name for name in names if name in found]
        height = max(1.0, len(shown) / 4)
        ticks.append(top - height / 2)
        for number, name in enumerate(shown):
            _closed(axes, found[name], top - height * (number + 0.5) / len(shown), styles[name])
        if all(row["gap_closed"] is None for row in found.values()):
            axes.annotate("no gap between the controls", (50, ticks[-1]), ha="center", va="center", fontsize=8)
        top -= height
        axes.axhline(top, color="#dddddd", linewidth=0.8)
    for control, line in ((0, "--"), (100, "-.")):
        axes.axvline(control, color="#777777", linestyle=line, linewidth=1)
    for name in names:
        axes.plot([], [], linestyle="", label=name, **styles[name])
    axes.set(xlim=LIMITS, ylim=(top, 0), yticks=ticks, yticklabels=[*cells])
    axes.set_xlabel(
        "gap closed, % (0: frozen client, 100: first-order client; line: 95 % interval over seeds)", fontsize=9
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _closed(axes: Axes, row: dict[str, Any], place: float, chosen: dict[str, Any]) -> None:
    """A row's share of the gap and its interval, if there is a gap."""
    if row["gap_closed"] is None:
        return
    ends = [min(max(100 * end, LIMITS[0]), LIMITS[1]) for end in row["gap_closed_interval"]]
    axes.plot(ends, [place, place], color=chosen["color"], linewidth=1.5)
    _dot(axes, 100 * row["gap_closed"], place, chosen, upright=False)


def over(rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]], cost: str, label: str) -> Figure:
    """A dot a row and cell."""
    figure = _figure(8.4, 4.4)
    axes = figure.subplots()
    for name, chosen in styles.items():
        found = [row for row in rows if row["method"] == name and row[cost]]
        if found:
            axes.plot([], [], linestyle="", label=name, **chosen)
        for row in found:
            _dot(axes, 100 * row["gap_closed"], row[cost], chosen, upright=True)
    axes.set(xscale="log", ylim=LIMITS, xlabel=label, ylabel="gap closed, %")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.grid(alpha=0.25)
    return figure


def _dot(axes: Axes, value: float, place: float, chosen: dict[str, Any], upright: bool) -> None:
    """A dot, or beyond `LIMITS` an arrow at the end of the axis and the number."""
    shown = min(max(value, LIMITS[0]), LIMITS[1])
    x, y = (place, shown) if upright else (shown, place)
    if shown == value:
        axes.plot(x, y, linestyle="", **chosen)
        return
    arrow = ("v^" if upright else "<>")[value > 0]
    axes.plot(x, y, marker=arrow, linestyle="", color=chosen["color"], clip_on=False)
    inward = -1 if value > 0 else 1
    numbers = [text.xy[0] for text in axes.texts if isinstance(text, Annotation)]
    near = sum(abs(math.log(other / x)) < NEAR for other in numbers) if upright else 0
    shift = (6, (6 + 11 * near) * inward) if upright else (8 * inward, 4)
    side = "left" if upright or inward > 0 else "right"
    axes.annotate(f"{value:.0f} %", (x, y), shift, textcoords="offset points", ha=side, fontsize=8)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
