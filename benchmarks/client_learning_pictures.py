"""The pictures of ``benchmarks.client_learning``: gap closed by cell and method, and over what it costs a client."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.cells import FIRST_ORDER, FROZEN
from benchmarks.client_learning_overview import title
from hosfl_lightning.compare.pictures import LINES, below, blank, facets, left_out, style

#: Of every axis of gap closed, in per cent; what lies beyond is an arrow with its number.
LIMITS = (-60.0, 220.0)
#: Costs this near to each other, by the logarithm of their ratio, would have one number over the other.
NEAR = 0.3
CONTROLS = (FROZEN, FIRST_ORDER)
NO_GAP = "Not shown, as the controls have no gap between them"
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
    if all(row["gap_closed"] is None for row in rows if row["method"] not in CONTROLS):
        return
    kinds = {name: {"algorithm": one["algorithm"]["class_path"].rpartition(".")[2]} for name, one in settings.items()}
    styles = {name: {"color": one["color"], "marker": one["marker"] or "s"}
              for name, one in style({"methods": kinds}).items()}  # fmt: skip
    with matplotlib.rc_context(LOOK):
        by_cell(rows, styles).savefig(out / "gap_closed.png")
        for cost, label in COSTS.items():
            over(rows, styles, cost, label).savefig(out / f"gap_closed_over_{cost}.png")


def by_cell(rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> Figure:
    """A panel a cell, a line a method with its interval; the controls are 0 and 100.

    A cell without a gap has no panel and is named below; one with more than `LINES` methods has two.
    """
    panels = [panel for name, found in cells(rows).items() for panel in _panels(name, found, styles)]
    lines = [max(len(found) for _, found in panels[n : n + 2]) for n in range(0, len(panels), 2)]
    figure = blank(12, 0.8 + sum(0.85 + 0.25 * number for number in lines))
    shape = {"height_ratios": [number + 1 for number in lines], "hspace": 0.06}
    grid = figure.subplots(len(lines), 2, sharex=True, squeeze=False, gridspec_kw=shape)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, found) in zip(grid.flat, panels):
        for control, line in ((0, "--"), (100, "-.")):
            axes.axvline(control, color="#777777", linestyle=line, linewidth=1)
        for place, (method, row) in enumerate(found.items()):
            _closed(axes, row, place, {"color": styles[method]["color"], "marker": "o"})
        axes.set(xlim=LIMITS, ylim=(len(found) - 0.4, -0.6), yticks=range(len(found)), yticklabels=[*found])
        axes.set_title(name, fontsize=10, loc="left")
        axes.tick_params(labelbottom=True)
        axes.grid(axis="x", alpha=0.25)
    how = "gap closed, %: 0 the frozen client, 100 the first-order one; line: 95 % interval over seeds; arrow: goes on"
    below(figure, how, *not_shown(rows))
    return figure


def cells(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by cell and method."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(title(row), {})[row["method"]] = row
    return found


def not_shown(rows: Iterable[dict[str, Any]]) -> list[str]:
    """In words, the cells and the single rows of which no picture can say anything."""
    gaps, failed = list[str](), list[str]()
    for name, found in cells(rows).items():
        without = [method for method, row in found.items() if row["gap_closed"] is None]
        if len(without) == len(found):
            gaps.append(name)
        else:
            failed += [f"{method} in {name}" for method in without]
    return [left_out(NO_GAP, gaps), left_out("Not shown, as no share is known of them", failed)]


def _panels(
    name: str, found: dict[str, dict[str, Any]], styles: dict[str, Any]
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """A cell's rows that are to be drawn, in the order of the styles and in parts of equal size."""
    shown = [n for n in styles if n not in CONTROLS and n in found and found[n]["gap_closed"] is not None]
    count = math.ceil(len(shown) / LINES)
    for part in range(count):
        names = shown[part * len(shown) // count : (part + 1) * len(shown) // count]
        yield f"{name} ({part + 1} of {count})" if count > 1 else name, {n: found[n] for n in names}


def _closed(axes: Axes, row: dict[str, Any], place: float, chosen: dict[str, Any]) -> None:
    """A row's share of the gap and its interval, with an arrow head where the axis cuts it."""
    low, high = (100 * end for end in row["gap_closed_interval"])
    if low < LIMITS[1] and high > LIMITS[0]:
        ends = max(low, LIMITS[0]), min(high, LIMITS[1])
        axes.plot(ends, [place, place], color=chosen["color"], linewidth=1.5)
        for end, cut, head in ((ends[0], low < LIMITS[0], "<"), (ends[1], high > LIMITS[1], ">")):
            if cut:
                axes.plot(end, place, color=chosen["color"], marker=head, linestyle="", clip_on=False)
    _dot(axes, 100 * row["gap_closed"], place, chosen, upright=False)


def over(rows: list[dict[str, Any]], styles: dict[str, dict[str, Any]], cost: str, label: str) -> Figure:
    """A dot a row and cell, a few methods a panel, the two controls hollow in each of them."""
    known = [row for row in rows if row["gap_closed"] is not None and row[cost]]
    names = [name for name in styles if any(row["method"] == name for row in known)]
    panels = facets(names, CONTROLS)
    figure = blank(8.4, 0.9 + 2.6 * len(panels))
    for axes, shown in zip(figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False).flat, panels):
        for name in shown:
            look = styles[name] | ({"markerfacecolor": "none", "markersize": 10} if name in CONTROLS else {})
            axes.plot([], [], linestyle="", label=name, **look)
            for row in known:
                if row["method"] == name:
                    _dot(axes, 100 * row["gap_closed"], row[cost], look, upright=True)
        axes.set(xscale="log", ylim=LIMITS, ylabel="gap closed, %")
        if cost == "client_forward_equivalents":  # within a decade or two
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        axes.grid(alpha=0.25)
    axes.set_xlabel(label)
    below(figure, "A dot a task and cut.", *not_shown(rows))
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
    axes.annotate(f"{value:.0f} %", (x, y), shift, textcoords="offset points", ha=side, fontsize=8,
                  color=chosen["color"])  # fmt: skip
