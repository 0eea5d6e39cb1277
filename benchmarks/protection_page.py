"""The tables of ``benchmarks.protections``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.protection_rows import ALL, FIRST_ORDER, FROZEN
from hosfl_lightning.compare.statistics import gap_closed

NONE = "–"


def page(found: Mapping[str, Any]) -> str:
    """A table a task."""
    lines = ["# What keeps data from the server", "", f"`{found['command']}`; {found['date']}, {found['machine']}"]
    for task in dict.fromkeys(one["row"].partition("/")[0] for one in found["runs"]):
        runs = [one for one in found["runs"] if one["row"].startswith(f"{task}/")]
        lines += ["", f"## {task}, {runs[0]['rounds']} rounds", "", *table(task, runs)]
    return "\n".join([*lines, ""])


def table(task: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss and gap closed, and what the best attack of each kind has found."""
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for one in runs:
        by_row.setdefault(one["row"].partition("/")[2], []).append(one)
    losses = {name: {one["seed"]: one["after"] for one in some} for name, some in by_row.items()}
    on_sent = {name: {one["seed"]: one["as_sent"] or one["after"] for one in some} for name, some in by_row.items()}
    what = ALL[task].found
    lines = [
        f"| protection | loss | loss, z as sent | gap closed | {what} found | labels found | by chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, some in by_row.items():
        labels, chance = best(some, ("labels", "next tokens", "label groups")), best(some, (what,))[1]
        cells = [
            name, spread(losses[name].values()), sent(some), closed(on_sent[name], losses),
            share(best(some, (what,))[0]), share(labels[0]), f"{share([chance])}, {share([labels[1]])}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sent(runs: Sequence[Mapping[str, Any]]) -> str:
    """Where z is noised, the loss on it; elsewhere the loss is of what is sent."""
    known = [one["as_sent"] for one in runs if one["as_sent"] is not None]
    return spread(known) if known else NONE


def best(runs: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> tuple[list[float], float]:
    """By seed the share that the most successful attack has found, and the mean of what its trivial guess has."""
    tops = [
        max(
            (score for score in one["scores"] if score["measure"] in measures),
            key=lambda score: score["value"],
            default=None,
        )
        for one in runs
    ]
    there = [top for top in tops if top is not None]
    return [top["value"] for top in there], fmean([top["trivial"] for top in there]) if there else float("nan")


def share(values: Iterable[float]) -> str:
    """In percent, the mean; and the standard deviation over seeds where there are some."""
    known = [100 * value for value in values if value == value]
    if not known:
        return NONE
    return f"{fmean(known):.0f} %" + (f" ± {stdev(known):.0f}" if len(known) > 1 else "")


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    known = list(values)
    return f"{fmean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def closed(own: Mapping[int, float], losses: Mapping[str, Mapping[int, float]]) -> str:
    """``(frozen − this) / (frozen − first order)`` on the means over seeds, both without protection."""
    found, _ = gap_closed(own, losses.get(FROZEN, {}), losses.get(FIRST_ORDER, {}))
    if found is not None and found["high"] is not None and found["high"] < 0:
        return "behind frozen"
    return NONE if found is None else "{value:.0%} [{low:.0%}, {high:.0%}]".format(**found).replace("%", " %")
