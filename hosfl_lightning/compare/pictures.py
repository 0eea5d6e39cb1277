"""The results as pictures: curves with a band of seeds, and memory bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hosfl_lightning.compare.results import FIRST_ORDER, FROZEN
from hosfl_lightning.run.summary import size

#: Paul Tol's "muted" and "bright" for colour-blind readers, ordered so that neighbours differ in lightness as well.
COLOURS = (
    "#332288", "#cc6677", "#44aa99", "#ddaa33", "#882255", "#88ccee",
    "#117733", "#aa4499", "#4477aa", "#ee7733", "#999933", "#ff99aa",
)  # fmt: skip
#: The two controls are the frame of a picture, not parties in it.
CONTROLS = {FROZEN: ("#000000", "--"), FIRST_ORDER: ("#777777", "-.")}
MARKERS = "osD^vPX<>*ph"
SIZE, DPI = (8.4, 4.4), 130
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
    drawn: dict[str, Path] = {}
    metric = results["metric"] or "loss"
    for abscissa, (name, label) in AXES.items():
        with _picture(folder / f"{name}.png", drawn, name) as axes:
            _curves(axes, results, styles, metric, abscissa)
            axes.set(xlabel=label, ylabel=f"validation {metric}".replace("_", " "))
    with _picture(folder / "memory.png", drawn, "memory") as axes:
        _bars(axes, results, styles)
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


def _curves(axes: Axes, results: dict[str, Any], styles: dict[str, dict[str, Any]], metric: str, abscissa: str) -> None:
    """Mean lines and bands; the legend stands in the order of the lines' ends, and names those that left the axes."""
    ends: dict[Any, float] = {}
    for name, row in results["methods"].items():
        points = [p for p in row["curve"] if p[abscissa] is not None and metric in p]
        if abscissa != "round":
            points = [p for p in points if p[abscissa] > 0]  # methods differ by orders of magnitude: log scale
        if not points:
            continue
        x = [p[abscissa] for p in points]
        low, middle, high = ([p[metric][which] for p in points] for which in ("low", "mean", "high"))
        (line,) = axes.plot(x, middle, label=name, linewidth=1.8, markersize=4.5, **styles[name])
        axes.fill_between(x, low, high, color=styles[name]["color"], alpha=0.13, linewidth=0)
        ends[line] = middle[-1]
    if abscissa == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xscale("log")
    limits = _limits(results, metric)
    if limits is not None:
        axes.set_ylim(*limits)
        for line, end in ends.items():
            if not limits[0] <= end <= limits[1]:
                line.set_label(f"{line.get_label()} (off the axis)")
    handles = sorted(ends, key=lambda line: -ends[line])
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=2.6)
    axes.grid(alpha=0.25)


def _limits(results: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """Of the axis: no row is followed far beyond where the rows started, or one that diverged would hide all others."""
    curves = [[p[metric] for p in row["curve"] if metric in p] for row in results["methods"].values()]
    begins = [c[0]["mean"] for c in curves if c and isfinite(c[0]["mean"])]
    if not begins:
        return None
    rises = results["metric"] is not None and results["mode"] == "max"  # the loss falls, whatever the mode
    sign, worst = (-1, min(begins)) if rises else (1, max(begins))
    values = [value for c in curves for p in c for value in p.values() if isfinite(value)]
    far = SLACK * max((sign * (worst - value) for value in values), default=0)
    ends = [value for value in values if sign * (value - worst) <= far]
    low, high = min([worst, *ends]), max([worst, *ends])
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _bars(axes: Axes, results: dict[str, Any], styles: dict[str, dict[str, Any]]) -> None:
    """One client's peak; the mark is what inference alone would need."""
    known = {name: row for name, row in results["methods"].items() if row.get("client_peak_bytes") is not None}
    names = sorted(known, key=lambda name: -known[name]["client_peak_bytes"])
    peaks = [known[name]["client_peak_bytes"] / 2**20 for name in names]
    bars = axes.barh(names, peaks, color=[styles[name]["color"] for name in names], height=0.7)
    axes.bar_label(bars, [size(known[name]["client_peak_bytes"]) for name in names], padding=3)
    for place, name in enumerate(names):
        inference = known[name]["client_inference_bytes"] / 2**20
        axes.plot([inference] * 2, [place - 0.35, place + 0.35], color="white", linewidth=2.5)
        axes.plot([inference] * 2, [place - 0.35, place + 0.35], color="black", linewidth=1.2, linestyle=":")
    axes.set(xlabel="peak memory of one client, MiB (dotted: a plain forward)", xlim=(0, 1.15 * max(peaks, default=1)))


@contextmanager
def _picture(path: Path, drawn: dict[str, Path], name: str) -> Iterator[Axes]:
    """Axes to draw on; without a display, and without the state of pyplot."""
    with matplotlib.rc_context({"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        yield axes
        if axes.lines or axes.patches:
            figure.savefig(path)
            drawn[name] = path
