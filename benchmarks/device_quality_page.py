"""The tables of ``benchmarks.device_quality``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from hosfl_lightning.compare.statistics import gap_closed

NAMES = {"side": "side adapter", "lora": "LoRA, 8 probes", "frozen": "frozen", "first_order": "first order"}
ENGINES = {"torch": "PyTorch, fp32", "fp32": "ONNX, fp32", "int8": "ONNX, int8", "int4": "ONNX, int4"}
#: 97.5 % of Student's t, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Losses = Mapping[str, Mapping[int, Any]]


def page(found: Mapping[str, Any]) -> str:
    """Two tables: what came out, and validation before and after with either half."""
    losses = by_row(found["runs"], "after")
    return "\n".join([
        f"# Training on halves in 8 and 4 bits\n\n`{found['command']}`; {found['date']}, {found['machine']}\n",
        *results(found, losses), "", *validations(found["runs"]), "",
    ])  # fmt: skip


def by_row(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[int, Any]]:
    """A value by row, in their order, and seed."""
    found: dict[str, dict[int, Any]] = {}
    for one in runs:
        found.setdefault(one["row"], {})[one["seed"]] = one[key]
    return found


def results(found: Mapping[str, Any], losses: Losses) -> list[str]:
    """The first table."""
    lines = ["| client | half | graph, KiB | estimate | loss | less ONNX fp32 | gap closed |", "|---|---|---|---|---|---|---|"]
    for name in losses:
        kind, engine = name_of(name)
        half = found["halves"].get(name)
        size, estimate = "–", "–"
        if half is not None:
            value = half["probes"] if half["cosine"] is None else half["cosine"]
            size, estimate = f"{half['bytes'] / 1024:,.0f}", "–" if value is None else f"{value:.4f}"
        reference = f"{name.partition('/')[0]}/fp32"
        less = "–" if name == reference or "/" not in name else difference(losses[name], losses.get(reference, {}))
        cells = [kind, engine, size, estimate, spread(losses[name].values()), less, closed(name, losses)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def validations(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The second table: the same weights, and z from either half."""
    lines = ["| client | half | before, fp32 | before, its half | after, fp32 | after, its half |", "|---|---|---|---|---|---|"]
    before, after, own = (by_row(runs, key) for key in ("before", "after", "on_devices"))
    for name in before:
        devices = [one for one in own[name].values() if one is not None]
        pair = [spread(one[at] for one in devices) if devices else "–" for at in (0, 1)]
        cells = [spread(before[name].values()), pair[0], spread(after[name].values()), pair[1]]
        lines.append(f"| {' | '.join([*name_of(name), *cells])} |")
    return lines


def name_of(row: str) -> tuple[str, str]:
    """Client and half, for people."""
    kind, _, engine = row.partition("/")
    return NAMES[kind], ENGINES[engine or "torch"]


def spread(values: Any) -> str:
    """Mean and standard deviation over seeds."""
    known = list(values)
    return f"{mean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def difference(own: Mapping[int, float], reference: Mapping[int, float]) -> str:
    """Mean over seeds of this less the reference, with its 95 % t interval."""
    pairs = [own[seed] - reference[seed] for seed in sorted(own.keys() & reference.keys())]
    if len(pairs) < 2:
        return f"{pairs[0]:+.4f}" if pairs else "–"
    half = T[len(pairs) - 1] * stdev(pairs) / len(pairs) ** 0.5
    return f"{mean(pairs):+.4f} [{mean(pairs) - half:+.4f}, {mean(pairs) + half:+.4f}]"


def closed(name: str, losses: Losses) -> str:
    """The share of the gap, with its interval over seeds."""
    value, _ = gap_closed(losses[name], losses.get("frozen", {}), losses.get("first_order", {}))
    if value is None:
        return "–"
    return f"{value['value']:.1%}".replace("%", " %") + f" [{value['low']:.1%}, {value['high']:.1%}]".replace("%", " %")
