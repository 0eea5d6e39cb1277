"""What the attacks have found: a table, ``attack.json`` and ``attack.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hosfl_lightning.attack.score import Score
from hosfl_lightning.files import write_json

#: Of what is recovered, and of the trivial guess.
COLOURS = ("#cc6677", "#888888")


def as_written(facts: Mapping[str, Any], scores: Sequence[Score], left_out: Mapping[str, str]) -> dict[str, Any]:
    """The content of ``attack.json``."""
    return {**facts, "scores": [asdict(one) for one in scores], "left_out": dict(left_out)}


def print_report(title: str, scores: Sequence[Score], left_out: Mapping[str, str]) -> None:
    """One row a score, then in words what could not be tried."""
    console, table = Console(soft_wrap=True), Table(title=title, title_justify="left")
    for head in ("attack", "recovered", "share", "95 %", "trivial", "n", ""):
        table.add_column(head, no_wrap=True, justify="left" if head in ("attack", "recovered", "") else "right")
    for one in scores:
        value, low, high, trivial = (_said(one, part) for part in (one.value, one.low, one.high, one.trivial))
        table.add_row(one.attack, one.measure, value, f"{low} .. {high}", trivial, str(one.count), one.note)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    for name, why in left_out.items():
        console.print(f"[bold]{name}[/bold]  not tried: {why}", highlight=False)


def draw(title: str, scores: Sequence[Score], path: Path) -> None:
    """Bars with intervals: what was recovered, and above it the trivial guess."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 1.2 + 0.5 * len(scores)), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, one in enumerate(scores):
            axes.barh(place + 0.19, one.value, 0.36, color=COLOURS[0], label="recovered" if not place else None)
            axes.barh(place - 0.19, one.trivial, 0.36, color=COLOURS[1], label="trivial guess" if not place else None)
            axes.plot([one.low, one.high], [place + 0.19] * 2, color="black", linewidth=1.4)
        names = [f"{one.attack}: {one.measure}" + (f"\n{one.note}" if one.note else "") for one in scores]
        axes.set_yticks(range(len(scores)), names, fontsize=8.5)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share recovered, or AUC (line: 95 % interval)", title=title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path)


def write(out: Path, title: str, told: dict[str, Any], scores: Sequence[Score]) -> None:
    """``attack.json`` and ``attack.png``."""
    write_json(out / "attack.json", told, indent=2)
    if scores:
        draw(title, scores, out / "attack.png")


def _said(score: Score, value: float) -> str:
    return f"{value:.3f}" if score.measure in ("AUC", "ROUGE-L") else f"{value:.1%}"
