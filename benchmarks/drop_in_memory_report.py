"""The page and the picture of ``benchmarks.drop_in_memory``."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hosfl_lightning.compare.pictures import COLOURS, DPI
from hosfl_lightning.run.summary import size

BACKPROP, CHECKPOINTED, FORWARD = "backprop", "backprop, checkpointed", "plain forward, no gradient"
HYBRID = "HybridOrder"
Row = dict[str, Any]
LOOK: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}


def by_length(found: dict[str, Any]) -> dict[int, dict[str, Row]]:
    """Rows by sequence length, then by method, in the order of the run."""
    lengths: dict[int, dict[str, Row]] = {}
    for row in found["rows"]:
        lengths.setdefault(row["length"], {})[row["method"]] = row
    return lengths


def ratio(rows: dict[str, Row], method: str, of: str = "peak_bytes", to: str = BACKPROP) -> float:
    """One method's bytes or seconds over another's."""
    return rows[method][of] / rows[to][of]


def page(found: dict[str, Any]) -> str:
    """``drop_in_memory.md``."""
    lengths = by_length(found)
    tables = [table(length, rows) for length, rows in lengths.items()]
    return "\n".join([heading(found), *tables, verdict(*max(lengths.items())), vocabularies(found)])


def heading(found: dict[str, Any]) -> str:
    """What was measured, of what, and how to read it."""
    model = found["model"]
    return f"""# What a callback saves

`{found["command"]}`, {found["date"]}, {found["machine"]}.

An OPT-shaped model with random weights: hidden {model["hidden"]}, {model["layers"]} layers, {model["heads"]} heads, a
vocabulary of {model["vocabulary"]}, {model["parameters"]:,} parameters, {model["precision"]}, {model["optimizer"]},
batches of {model["batch"]}, cut at layer {model["cut"]}. Peak: all tensors at once, parameters, gradients and optimizer
state included, in the second batch. Held: what is there between two steps. Both callbacks run with their defaults (two
probes below the cut; one, two-sided, of the whole model) and SGD. Seconds are the processor's, medians of a few steps.

![Peak memory and seconds of a step](drop_in_memory.png)
"""


def table(length: int, rows: dict[str, Row]) -> str:
    """One sequence length."""
    lines = [
        f"## {length:,} tokens\n",
        "| method | peak | over backprop's | held | seconds a step | over backprop's |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        peak, seconds = ratio(rows, name), ratio(rows, name, "seconds")
        lines.append(f"| {name} | {size(row['peak_bytes'])} | {peak:.3f} | {size(row['held_bytes'])} "
                     f"| {row['seconds']:#.3g} | {seconds:.2f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def verdict(length: int, rows: dict[str, Row]) -> str:
    """What the longest sequences say about the lower part."""
    lower = ratio(rows, HYBRID, "lower_working_bytes", FORWARD)
    both = ratio(rows, f"{HYBRID}, checkpointed", to=CHECKPOINTED)
    return (
        f"At {length:,} tokens `HybridOrder` takes {ratio(rows, HYBRID):.3f} of backprop's peak; with activation "
        f"checkpointing, {both:.3f} of the checkpointed model's. The lower part's working bytes are {lower:.3f} of its "
        f"plain forward's ({size(rows[HYBRID]['lower_working_bytes'])}).\n"
    )


def vocabularies(found: dict[str, Any]) -> str:
    """The head is above the cut whatever the method, so its share decides how much there is to save."""
    lines = [
        "The head's activations, about `V / (4 h L)` of the layers' for `V` words, `L` layers of `h` features, stay "
        "above the cut (OPT-125M: 1.36, OPT-6.7B: 0.10). So does half of the optimizer's state. Measured at the same "
        "length:\n",
        "| vocabulary | `V / (4 h L)` | backprop | HybridOrder | ratio |",
        "|---|---|---|---|---|",
    ]
    model, rows = found["model"], max(by_length(found).items())[1]
    own = {name: rows[name]["peak_bytes"] for name in (BACKPROP, HYBRID)}
    peaks = {model["vocabulary"]: own} | {row["vocabulary"]: row["peak_bytes"] for row in found["vocabularies"]}
    for words, peak in peaks.items():
        share = words / (4 * model["hidden"] * model["layers"])
        lines.append(f"| {words:,} | {share:.3f} | {size(peak[BACKPROP])} | {size(peak[HYBRID])} "
                     f"| {peak[HYBRID] / peak[BACKPROP]:.3f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any]) -> Figure:
    """A panel a length; a bar a method, its peak over backprop's, bytes and seconds at the right."""
    lengths = by_length(found)
    names = list(reversed(next(iter(lengths.values()))))
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(2.2 + 3.4 * len(lengths), 3.4), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        for axes, (length, rows) in zip(panels, lengths.items()):
            ratios = [ratio(rows, name) for name in names]
            axes.barh(names, ratios, color=[_colour(name) for name in names], height=0.7)
            for place, name in enumerate(names):
                label = f"{size(rows[name]['peak_bytes'])}, {rows[name]['seconds']:#.2g} s"
                axes.text(1.05 * max(ratios), place, label, va="center", fontsize=8.5)
            axes.axvline(1, color="#777777", linestyle="--", linewidth=1)
            axes.set(xlim=(0, 1.8 * max(ratios)), xticks=(0, 0.5, 1), title=f"{length:,} tokens")
        figure.supxlabel("peak memory over that of backprop; at the right: peak, seconds of a step", fontsize=9.5)
    return figure


def _colour(name: str) -> str:
    if name == FORWARD:
        return "#777777"
    return COLOURS[0 if name.startswith(HYBRID) else 2 if name.startswith("Zeroth") else 8]
