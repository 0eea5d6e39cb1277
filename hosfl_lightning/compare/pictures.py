"""The results as pictures: curves with a band of seeds, and memory bars."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from math import ceil, inf, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from hosfl_lightning.compare.results import FIRST_ORDER, FROZEN
from hosfl_lightning.rendering import listed
from hosfl_lightning.run.summary import size

#: Paul Tol's "muted" and "bright" for colour-blind readers, ordered so that neighbours differ in lightness as well.
COLOURS = (
    "#332288", "#cc6677", "#44aa99", "#ddaa33", "#882255", "#88ccee",
    "#117733", "#aa4499", "#4477aa", "#ee7733", "#999933", "#ff99aa",
)  # fmt: skip
#: The two controls are the frame of a picture, not parties in it.
CONTROLS = {FROZEN: ("#000000", "--"), FIRST_ORDER: ("#777777", "-.")}
#: No triangles: those are the arrow heads where something leaves the axes.
MARKERS = "osDPX*pdh"
SIZE, DPI = (8.4, 4.4), 130
LOOK: Any = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}
#: Lines of a panel at most; and beside the controls, where one panel does not do.
LINES, BESIDE = 8, 4
#: How far beyond the worst start a row is followed, in parts of the way that the best has gone.
SLACK = 0.5
AXES = {
    "round": ("rounds", "rounds"),
    "bytes": ("bytes", "bytes on the wire, all clients (log scale)"),
    "client_forwards": ("client_forwards", "client arithmetic, in plain forwards, all clients (log scale)"),
}


def draw(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write every picture of which something is known; the files by name."""
    styles = style(results)
    metric = results["metric"] or "loss"
    drawn: dict[str, Path] = {}
    with matplotlib.rc_context(LOOK):
        figures = {name: curves(results, styles, metric, abscissa) for abscissa, (name, _) in AXES.items()}
        for name, figure in {**figures, "memory": bars(results, styles)}.items():
            if figure is not None:
                drawn[name] = folder / f"{name}.png"
                figure.savefig(drawn[name])
    return drawn


def style(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each method, the same in all pictures."""
    styles: dict[str, dict[str, Any]] = {}
    for name, row in results["methods"].items():
        number = sum(one["marker"] != "" for one in styles.values())
        if row["algorithm"] in CONTROLS and CONTROLS[row["algorithm"]][0] not in {s["color"] for s in styles.values()}:
            colour, line = CONTROLS[row["algorithm"]]
            styles[name] = {"color": colour, "linestyle": line, "marker": ""}
        else:
            line = ("-", ":")[number // len(COLOURS) % 2]
            marker = MARKERS[number % len(MARKERS)]
            styles[name] = {"color": COLOURS[number % len(COLOURS)], "linestyle": line, "marker": marker}
    return styles


def facets(names: Sequence[str], controls: Collection[str]) -> list[list[str]]:
    """The rows of each panel: all in one up to `LINES`, else both controls in each, and at most `BESIDE` others."""
    others = [name for name in names if name not in controls]
    count = 1 if len(names) <= LINES else ceil(len(others) / BESIDE)
    cuts = [number * len(others) // count for number in range(count + 1)]
    panels = [{*controls, *others[start:end]} for start, end in pairwise(cuts)]
    return [[name for name in names if name in panel] for panel in panels]


def curves(results: dict[str, Any], styles: dict[str, dict[str, Any]], metric: str, abscissa: str) -> Figure | None:
    """Mean lines and bands of seeds, in panels with the same axes; None: no row has a value on this axis."""
    points = {name: _points(row, metric, abscissa) for name, row in results["methods"].items()}
    known = [name for name in points if points[name]]
    if not known:
        return None
    panels = facets(known, [name for name in known if styles[name]["marker"] == ""])
    width, height = SIZE
    figure = blank(width, height if len(panels) == 1 else 0.6 + 0.65 * height * len(panels))
    limits = _limits(results, metric, points.values())
    for axes, names in zip(figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False).flat, panels):
        if abscissa == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xscale("log")
            _mark(axes, [p[abscissa] for name in known for p in points[name]], abscissa)
        if limits is not None:
            axes.set_ylim(*limits)
        _lines(axes, {name: points[name] for name in names}, styles, metric, abscissa, limits or (-inf, inf))
        axes.set_ylabel(f"validation {metric}".replace("_", " "))
    axes.set_xlabel(AXES[abscissa][1])
    below(figure, left_out("Without a line, as nothing is known on these axes", [n for n in points if n not in known]))
    return figure


def _points(row: dict[str, Any], metric: str, abscissa: str) -> list[dict[str, Any]]:
    """Of a curve, what the axes can show: methods differ by orders of magnitude in bytes and forwards, hence logs."""
    found = [p for p in row["curve"] if p[abscissa] is not None and metric in p]
    return found if abscissa == "round" else [p for p in found if p[abscissa] > 0]


def _lines(
    axes: Axes,
    rows: dict[str, list[dict[str, Any]]],
    styles: dict[str, dict[str, Any]],
    metric: str,
    abscissa: str,
    limits: tuple[float, float],
) -> None:
    """The legend stands in the order of the lines' ends; arrow heads are where a line or its band leaves the axes."""
    ends: dict[Any, float] = {}
    for name, points in rows.items():
        x = [p[abscissa] for p in points]
        low, middle, high = ([p[metric][which] for p in points] for which in ("low", "mean", "high"))
        (line,) = axes.plot(x, middle, label=name, linewidth=1.8, markersize=4.5, **styles[name])
        axes.fill_between(x, low, high, color=styles[name]["color"], alpha=0.13, linewidth=0)
        ends[line] = middle[-1]
        if not limits[0] <= middle[-1] <= limits[1]:
            line.set_label(f"{name} (off the axis)")
        for values, end, sign, head in ((low, limits[0], -1, "v"), (high, limits[1], 1, "^")):
            place = _leaves(x, values, end, sign, log=abscissa != "round")
            if place is not None:
                axes.plot(place, end, color=styles[name]["color"], marker=head, linestyle="", clip_on=False, zorder=5)
    handles = sorted(ends, key=lambda line: -ends[line])
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.6)
    axes.grid(alpha=0.25)


def _leaves(x: Sequence[float], values: Sequence[float], end: float, sign: int, log: bool) -> float | None:
    """Where the edge of a band first crosses the end of the axis, upward if ``sign`` is 1; None: it stays within."""
    first = next((n for n, value in enumerate(values) if sign * value > sign * end), None)
    if not first:
        return None if first is None else x[0]
    inside, outside = values[first - 1], values[first]
    part = (end - inside) / (outside - inside)
    if log:
        return x[first - 1] * (x[first] / x[first - 1]) ** part
    return x[first - 1] + part * (x[first] - x[first - 1])


def _mark(axes: Axes, values: Sequence[float], abscissa: str) -> None:
    """Ticks of an axis of logarithms: 1, 2 and 5 of each decade where there are few, labels like ``20 MB``."""
    few = max(values) < 100 * min(values)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B" if abscissa == "bytes" else ""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _limits(
    results: dict[str, Any], metric: str, drawn: Iterable[Sequence[dict[str, Any]]]
) -> tuple[float, float] | None:
    """Of the axis, by what is drawn on it: no row is followed far beyond where the rows started.

    One that diverged would hide all others.
    """
    curves = [[p[metric] for p in row["curve"] if metric in p] for row in results["methods"].values()]
    begins = [c[0]["mean"] for c in curves if c and isfinite(c[0]["mean"])]
    if not begins:
        return None
    rises = results["metric"] is not None and results["mode"] == "max"  # the loss falls, whatever the mode
    sign, worst = (-1, min(begins)) if rises else (1, max(begins))
    values = [value for points in drawn for p in points for value in p[metric].values() if isfinite(value)]
    far = SLACK * max((sign * (worst - value) for value in values), default=0)
    ends = [value for value in values if sign * (value - worst) <= far] or [worst]
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def bars(results: dict[str, Any], styles: dict[str, dict[str, Any]]) -> Figure | None:
    """One client's peak; the mark is what inference alone would need. None: it was measured of no row."""
    known = {name: row for name, row in results["methods"].items() if row.get("client_peak_bytes") is not None}
    if not known:
        return None
    names = sorted(known, key=lambda name: -known[name]["client_peak_bytes"])
    peaks = [known[name]["client_peak_bytes"] / 2**20 for name in names]
    figure = blank(SIZE[0], max(2.0, 0.9 + 0.27 * len(names)))
    axes = figure.subplots()
    shown = axes.barh(names, peaks, color=[styles[name]["color"] for name in names], height=0.7)
    axes.bar_label(shown, [size(known[name]["client_peak_bytes"]) for name in names], padding=3)
    for place, name in enumerate(names):
        inference = known[name]["client_inference_bytes"] / 2**20
        axes.plot([inference] * 2, [place - 0.35, place + 0.35], color="white", linewidth=2.5)
        axes.plot([inference] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.2, linestyle=":")
    axes.set(xlabel="peak memory of one client, MiB (dotted: a plain forward)", xlim=(0, 1.15 * max(peaks)))
    below(figure, left_out("Without a bar, as it was not measured", [n for n in results["methods"] if n not in known]))
    return figure


def below(figure: Figure, *sentences: str) -> None:
    """Write below a picture what it does not show, each sentence on lines of its own."""
    width = int(11 * figure.get_figwidth())
    text = "\n".join(fill(sentence, width) for sentence in sentences if sentence)
    if text:
        figure.supxlabel(text, fontsize=9)


def left_out(why: str, names: Sequence[str]) -> str:
    """For `below`; nothing if there are none."""
    return f"{why}: {listed(names, '; ')}." if names else ""


def blank(width: float, height: float) -> Figure:
    """To draw on; without a display, and without the state of pyplot. In inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
