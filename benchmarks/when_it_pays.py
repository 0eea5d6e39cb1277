"""README's first figure: when a client that never backpropagates is worth having, a panel a kind of task.

    python -m benchmarks.when_it_pays --results docs/results

Reads what ``benchmarks.client_learning``, ``input_shift`` and ``paper_claims`` have measured and writes
``when_it_pays.png`` and the same as a table, ``when_it_pays.md``. Bars are test losses, mean over seeds with its
standard error, of a frozen client, the forward-only one that closes most of the gap in at most 4 KiB a client-round
beside z, and a first-order client; the number is the share of the gap that it closes, with its interval.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from benchmarks.cells import FIRST_ORDER, FROZEN
from hosfl_lightning.compare.pictures import below, blank
from hosfl_lightning.compare.statistics import gap_closed
from hosfl_lightning.files import write_whole

COLOURS = {FROZEN: "#bbbbbb", "forward-only": "#44aa99", FIRST_ORDER: "#777777"}
MODULES = {"client_learning": "client_learning", "input_shift": "input_shift", "claims": "paper_claims"}
LOOK: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True)
class Panel:
    """A cell of a benchmark, and the row that stands for the forward-only clients.

    Args:
        title: In words that a newcomer knows, two lines.
        file: Below the results.
        cell: Fields of its rows there.
        row: The method.
        sends: What it sends for its update, a client-round.
    """

    title: str
    file: str
    cell: dict[str, Any]
    row: str
    sends: str


DIGITS = {"task": "digits", "cut": 3, "server": "strong", "clients": 8, "alpha": None}
LLAMA = {"task": "shakespeare", "cut": 3, "server": "strong"}
FOUR_KB, SIDE = "side adapter, 4 KB", "at most 4 KB"
PANELS = [
    Panel("small images,\nfrom scratch", "client_learning", DIGITS, FOUR_KB, SIDE),
    Panel("a small Llama,\nto Shakespeare", "client_learning", LLAMA, FOUR_KB, SIDE),
    Panel("a small Llama,\nits text enciphered", "input_shift", {"cell": "cipher"}, FOUR_KB, SIDE),
    Panel("a camera that inverts,\ndeep cut", "input_shift", {"cell": "inverted_deep"}, "HO-SFL on norms, P = 32",
          "32 numbers"),
    Panel("a noisy camera", "input_shift", {"cell": "noise"}, "HO-SFL on norms, P = 32", "32 numbers"),
    Panel("Gemma-3-270M,\nfilm reviews", "claims", {"cell": "gemma_cut12_strong_bfloat16"}, FOUR_KB, SIDE),
    Panel("other labels at each client,\ninputs as trained", "input_shift", {"cell": "labels"},
          "HO-SFL on norms, P = 8", "8 numbers"),
]  # fmt: skip


def losses(results: Path, panel: Panel) -> dict[str, dict[int, float]]:
    """By bar, then by seed.

    Raises:
        SystemExit: The cell, or a row of it, was not measured.
    """
    content = json.loads((results / panel.file / f"{panel.file}.json").read_text())
    found = content["rows"] if "rows" in content else [
        {"cell": cell, "method": method, **row}
        for cell, one in content["cells"].items() for method, row in one["methods"].items()
    ]  # fmt: skip
    rows = {row["method"]: row for row in found if panel.cell.items() <= row.items()}
    bars = {FROZEN: FROZEN, "forward-only": panel.row, FIRST_ORDER: FIRST_ORDER}
    if lacking := [row for row in bars.values() if row not in rows]:
        place, module = f"{panel.file}: {[*panel.cell.values()]}", MODULES[panel.file]
        raise SystemExit(f"{place} has no row {lacking[0]!r}; run python -m benchmarks.{module}")
    return {bar: {int(s): v for s, v in rows[row]["loss"]["values"].items()} for bar, row in bars.items()}


def moments(values: dict[int, float]) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    mean = sum(values.values()) / len(values)
    variance = sum((value - mean) ** 2 for value in values.values()) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def closed(found: dict[str, dict[int, float]]) -> str:
    """The share of the gap in words."""
    share, _ = gap_closed(found["forward-only"], found[FROZEN], found[FIRST_ORDER])
    if share is None:
        return "no gap to close"
    return f"gap closed {share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]"


def draw(axes: Axes, panel: Panel, found: dict[str, dict[int, float]]) -> None:
    """Three bars."""
    for place, (bar, values) in enumerate(found.items()):
        mean, error = moments(values)
        axes.bar(place, mean, 0.75, yerr=error, color=COLOURS[bar], capsize=4, ecolor="#333333")
        axes.text(place, 0.02 * mean, f"{mean:.3f}", ha="center", va="bottom", fontsize=9)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xticks(range(3), ["frozen", "forward-\nonly", "first\norder"], fontsize=9)
    axes.set_xlabel(f"{closed(found)}\nits update: {panel.sends}", fontsize=9)


def table(found: list[tuple[Panel, dict[str, dict[int, float]]]]) -> str:
    """The figure in numbers."""
    lines = [
        "| task | frozen | forward-only | first order | gap closed | which | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for panel, bars in found:
        cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in map(moments, bars.values())]
        seeds = ", ".join(map(str, sorted(bars[FROZEN])))
        title = panel.title.replace("\n", " ")
        lines.append(
            f"| {title} | {' | '.join(cells)} | {closed(bars).removeprefix('gap closed ')} | {panel.row} | {seeds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    results = parser.parse_args().results
    found = [(panel, losses(results, panel)) for panel in PANELS]
    with matplotlib.rc_context(LOOK):
        figure = blank(2.3 * len(PANELS), 3.6)
        for axes, (panel, bars) in zip(figure.subplots(1, len(PANELS)), found):
            draw(axes, panel, bars)
        figure.axes[0].set_ylabel("test loss, nats (lower is better)")
        below(figure, "Mean over seeds, line: its standard error. Gap closed: 0 % the frozen client, 100 % the one that"
              " backpropagates and is averaged; in brackets the 95 % interval over seeds.")  # fmt: skip
        figure.savefig(results / "when_it_pays.png")
    write_whole(results / "when_it_pays.md", lambda file: file.write(table(found).encode()))


if __name__ == "__main__":
    main()
