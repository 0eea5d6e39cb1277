"""The page and the picture of ``benchmarks.many_clients``."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from hosfl_lightning.compare.pictures import COLOURS, DPI, LOOK
from hosfl_lightning.run.summary import size

COMMAND = "python -m benchmarks.many_clients --out docs/results"
Rows = list[dict[str, float]]


def slope(rows: Rows, x: str, y: str) -> float:
    """``b`` of ``y ≈ a · x^b``, by least squares on the logarithms of all points but the first."""
    upper = rows[1:]
    points = np.log([[max(row[name], 1e-9) for row in upper] for name in (x, y)])
    return float(np.polyfit(points[0], points[1], 1)[0])


def page(found: dict[str, Any]) -> str:
    """``many_clients.md``."""
    groups, whole, run = found["in groups"], found["one batch"], found["of a run"]
    ratios = "\n".join(f"| {name} | {value:.2f} |" for name, value in found["ratios"].items())
    return f"""# Many clients

`{COMMAND}`, {found["date"]}, {found["machine"]}.

A Llama of two layers of 32 features, one example of eight tokens a client, two probes, {found["rounds"]} rounds.
Seconds are the processor's; bytes, by how much the process's resident memory grew at its peak, over what it held
before (a process that has only imported the package holds about 0.5 GB).

![Seconds and bytes against clients of a round and of a run](many_clients.png)

## Clients of a round, of {int(groups[0]["clients"]):,}

| clients | in groups of 100 | over its clients | bytes | one batch | bytes |
|---|---|---|---|---|---|
{_rounds(groups, whole)}

Growth by `clients^b`, without the first row: seconds {slope(groups, "asked", "round_seconds"):.2f} in groups and
{slope(whole, "asked", "round_seconds"):.2f} in one batch, bytes {slope(groups, "asked", "round_bytes"):.2f} and
{slope(whole, "asked", "round_bytes"):.2f}. What is left in groups is of each client's answer,
its place in the record and in the ledger of bytes.

## Clients of a run, {int(run[0]["asked"])} of them in a round

| clients | until round 1 | bytes | a round |
|---|---|---|---|
{_run(run)}

Growth by `clients^b`, without the first row: until round 1 {slope(run, "clients", "registration_seconds"):.2f}, bytes
{slope(run, "clients", "registration_bytes"):.2f}, a round {slope(run, "clients", "round_seconds"):.2f}.

## Beside plain PyTorch

A round of `tiny_lm` over the same forwards, backward and probes' forwards by hand, in the same groups, on batches that
are ready: 1,000 clients, one example of 32 tokens each (`python -m benchmarks.many_clients`).

| case | ratio |
|---|---|
{ratios}
"""


def _rounds(groups: Rows, whole: Rows) -> str:
    return "\n".join(
        f"| {int(a['asked']):,} | {a['round_seconds']:#.3g} s | {1e3 * a['round_seconds'] / a['asked']:.2f} ms "
        f"| {size(a['round_bytes'])} | {b['round_seconds']:#.3g} s | {size(b['round_bytes'])} |"
        for a, b in zip(groups, whole)
    )


def _run(rows: Rows) -> str:
    return "\n".join(
        f"| {int(row['clients']):,} | {row['registration_seconds']:#.3g} s | {size(row['registration_bytes'])} "
        f"| {1e3 * row['round_seconds']:.0f} ms |"
        for row in rows
    )


def picture(found: dict[str, Any]) -> Figure:
    """Seconds above, bytes below; clients of a round at the left, of a run at the right."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(8.4, 6), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        (seconds, start), (peak, held) = figure.subplots(2, 2)
        groups, whole, run = found["in groups"], found["one batch"], found["of a run"]
        for label, rows, colour in (("groups of 100", groups, COLOURS[0]), ("one batch", whole, COLOURS[1])):
            _line(seconds, rows, "asked", "round_seconds", label, colour)
            _line(peak, rows, "asked", "round_bytes", label, colour)
        _line(start, run, "clients", "registration_seconds", "until round 1", COLOURS[2])
        _line(start, run, "clients", "round_seconds", "a round of ten", COLOURS[4])
        _line(held, run, "clients", "registration_bytes", "until round 1", COLOURS[2])
        for axes, unit, title in (
            (seconds, "s", "clients of a round"), (start, "s", "clients of a run"), (peak, "B", ""), (held, "B", ""),
        ):  # fmt: skip
            axes.set(xscale="log", yscale="log", title=title)
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.yaxis.set_major_formatter(EngFormatter(unit))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8.5)
        peak.set_xlabel("clients of a round, of 10,000")
        held.set_xlabel("clients of a run, ten of them a round")
    return figure


def _line(axes: Axes, rows: Rows, x: str, y: str, label: str, colour: str) -> None:
    xs, ys = ([row[name] for row in rows] for name in (x, y))
    axes.plot(xs, ys, "o-", color=colour, label=f"{label}, slope {slope(rows, x, y):.2f}")
