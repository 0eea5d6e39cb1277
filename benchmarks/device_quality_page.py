"""The tables of ``benchmarks.device_quality``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import correlation, mean, stdev
from typing import Any

from benchmarks.device_quality_rows import Row
from hosfl_lightning.compare.statistics import gap_closed

CLIENTS = {
    "tiny_lm/side": "side adapter", "tiny_lm/lora": "LoRA, 2 probes", "tiny_lm/frozen": "frozen",
    "tiny_lm/first_order": "first order, LoRA", "digits/frozen": "frozen", "digits/norm": "norms, 8 probes",
    "digits/first_order": "first order, norms",
}  # fmt: skip
ENGINES = {"torch": "PyTorch, fp32", "fp32": "ONNX, fp32", "int8": "ONNX, int8", "int4": "ONNX, int4"}
#: 97.5 % of Student's t, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NONE = "–"
#: By row and seed.
Values = Mapping[str, Mapping[int, Any]]


def page(found: Mapping[str, Any]) -> str:
    """Two tables a task: what came out, and what the halves themselves say."""
    lines = ["# Training on halves in 8 and 4 bits", "", f"`{found['command']}`; {found['date']}, {found['machine']}"]
    for task in dict.fromkeys(Row.of(one["row"]).task for one in found["runs"]):
        runs = [one for one in found["runs"] if Row.of(one["row"]).task == task]
        lines += ["", f"## {task}, {runs[0]['rounds']} rounds", "", *results(runs, found["halves"])]
        lines += ["", *validations(runs)]
    return "\n".join([*lines, ""])


def by_row(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[int, Any]]:
    """A value by row, in their order, and seed; without those that are None."""
    found: dict[str, dict[int, Any]] = {one["row"]: {} for one in runs}
    for one in runs:
        if one[key] is not None:
            found[one["row"]][one["seed"]] = one[key]
    return found


def results(runs: Sequence[Mapping[str, Any]], halves: Mapping[str, Any]) -> list[str]:
    """Loss at the end, beside the half in fp32 and the controls."""
    losses = by_row(runs, "after")
    lines = [
        "| client | half | graph, KiB | estimate | loss | less ONNX, fp32 | gap closed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in losses.items():
        size, estimate = NONE, NONE
        if name in halves:
            half = halves[name]
            value = half["probes"] if half["cosine"] is None else half["cosine"]
            size, estimate = f"{half['bytes'] / 1024:,.0f}", NONE if value is None else f"{value:.4f}"
        less = NONE if name == reference(name) else difference(values, losses.get(reference(name), {}))
        lines.append(line(name, size, estimate, spread(values.values()), less, closed(name, losses)))
    return lines


def validations(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same weights evaluated with z from either half; and the scalars beside those of the half in fp32."""
    lines = ["| client | half | before, fp32 | before, its half | after, fp32 | after, its half | scalars |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    before, after, own, scalars = (by_row(runs, key) for key in ("before", "after", "on_devices", "scalars"))
    for name in (name for name, values in own.items() if values):
        pair = [spread(one[at] for one in own[name].values()) for at in (0, 1)]
        theirs = scalars.get(reference(name), {})
        same = NONE if name == reference(name) else agreement(scalars[name], theirs)
        cells = spread(before[name].values()), pair[0], spread(after[name].values()), pair[1], same
        lines.append(line(name, *cells))
    return lines


def line(name: str, *cells: str) -> str:
    """Of a table."""
    row = Row.of(name)
    return f"| {' | '.join([CLIENTS[f'{row.task}/{row.client}'], ENGINES[row.engine], *cells])} |"


def reference(name: str) -> str:
    """The row of the same client whose half is in fp32."""
    row = Row.of(name)
    return Row(row.task, row.client, "fp32").name


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    known = list(values)
    return f"{mean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def difference(own: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Mean over seeds of this less the other, with its 95 % t interval."""
    pairs = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    if len(pairs) < 2:
        return signed(pairs[0]) if pairs else NONE
    middle, half = mean(pairs), T[len(pairs) - 1] * stdev(pairs) / len(pairs) ** 0.5
    return f"{signed(middle)} [{signed(middle - half)}, {signed(middle + half)}]"


def signed(value: float) -> str:
    """In four digits; a zero has a plus."""
    return f"{round(value, 4) + 0.0:+.4f}"


def agreement(own: Mapping[int, str], other: Mapping[int, str]) -> str:
    """Correlation of two runs' scalars, the mean over seeds."""
    pairs = [[[float(word) for word in text.split()] for text in (own[s], other[s])] for s in own.keys() & other.keys()]
    found = [correlation(*pair) for pair in pairs if len(pair[0]) > 2]
    return f"{mean(found):.4f}" if found else NONE


def closed(name: str, losses: Values) -> str:
    """``(frozen − this) / (frozen − first order)`` on the means over seeds, with its interval over them."""
    task = Row.of(name).task
    frozen, first = (losses.get(Row(task, one, "torch").name, {}) for one in ("frozen", "first_order"))
    found, _ = gap_closed(losses[name], frozen, first)
    if found is None:
        return NONE
    return "{value:.1%} [{low:.1%}, {high:.1%}]".format(**found).replace("%", " %")
