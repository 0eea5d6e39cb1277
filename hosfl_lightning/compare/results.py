"""The results in numbers: everything that tables and pictures show."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from math import isfinite
from statistics import mean
from typing import Any

import torch

from hosfl_lightning.compare.runs import ABSCISSAE, Group
from hosfl_lightning.compare.settings import ComparisonError, Target
from hosfl_lightning.compare.statistics import first_reaching, gap_closed, spread
from hosfl_lightning.run.identity import hardware

#: Which class of method is which control.
FROZEN, FIRST_ORDER = "Frozen", "SplitFedSGD"


def reckon(
    groups: list[Group],
    metric: str | None,
    mode: str,
    target: Target | None,
    command: str,
    first_order: str | None = None,
) -> dict[str, Any]:
    """``results.json``: losses in nats, sizes in bytes, times in seconds.

    ``gap_closed`` of a method is what `gap_closed` gives and the ``split`` whose losses it was given: ``test`` where
    every run has a test loss, else ``validation``. (In ``summary.json`` it is one run's, in validation loss.)
    ``client_put_back`` is the test loss with the server as trained and the client half as before the first round; None
    of a method that leaves it there, or whose clients hold the whole model.

    Args:
        groups: The rows.
        metric: Beside the loss; None: the loss alone.
        mode: Whether a high or a low metric is good.
        target: None: the frozen control's mean validation loss at its end.
        command: As it was given.
        first_order: Row whose gap to the frozen control is the whole gap; None: the one of `FIRST_ORDER`.

    Raises:
        ComparisonError: No run is finished, or a run has no such metric.
    """
    groups = [_finite(group) for group in groups]
    runs = [run for group in groups for run in group.runs.values()]
    if not runs:
        raise ComparisonError("no run is finished: there is nothing to show")
    metrics = ["loss", *([metric] if metric else [])]
    for name in metrics:
        for run in runs:
            if name not in run.validation:
                known = ", ".join(run.validation)
                raise ComparisonError(f"metric: {run.folder} has no {name!r} on the validation set; it has {known}")
    split = "test" if all(run.test is not None for run in runs) else "validation"
    losses = {group.name: _values(group, split, "loss") for group in groups}
    frozen, whole = _only(groups, FROZEN), _only(groups, FIRST_ORDER, first_order)
    target, why = _target(target, frozen)
    methods = {}
    for group in groups:
        found, reason = None, _missing(frozen, whole)
        if frozen and whole:
            found, reason = gap_closed(losses[group.name], losses[frozen.name], losses[whole.name])
        methods[group.name] = {
            "algorithm": group.algorithm,
            "seeds": sorted(group.runs),
            "failed": {str(seed): why for seed, why in sorted(group.failed.items())},
            **group.details,
            **{name: _row(group, split, name) for name in metrics},
            "validation_loss": spread(_values(group, "validation", "loss").values()),
            "gap_closed": {**found, "split": split} if found else None,
            "no_gap_closed": reason,
            "below_frozen": _difference(losses[frozen.name], losses[group.name]) if frozen else None,
            "client_put_back": _put_back(group),
            "rounds_to_target": _reached(group, target, mode),
            **_costs(group),
            "curve": _curve(group),
        }
    return {
        "evaluated_on": split,
        "metric": metric,
        "mode": mode,
        "target": {"metric": target.metric, "value": target.value} if target else None,
        "no_target": why,
        "methods": methods,
        "made": made(command, [run.summary["versions"] for run in runs]),
    }


def made(command: str, versions: list[dict[str, str]]) -> dict[str, Any]:
    """When, how and on what."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    different = {name: sorted({one[name] for one in versions}) for name in versions[0]}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": f"{os.cpu_count()} cores, {memory / 2**30:.0f} GiB; {hardware(torch.device('cpu'))}",
        "versions": {name: " and ".join(found) for name, found in different.items()},
    }


def _finite(group: Group) -> Group:
    """A run that ended with a loss that is no number has failed, however far it came."""
    runs, failed = {}, dict(group.failed)
    for seed, run in group.runs.items():
        bad = [one["loss"] for one in (run.validation, run.test or run.validation) if not isfinite(one["loss"])]
        if bad:
            failed[seed] = f"its loss is {bad[0]}"
        else:
            runs[seed] = run
    return Group(group.name, runs, failed, group.details)


def _values(group: Group, split: str, metric: str) -> dict[int, float]:
    return {
        seed: (run.test or {} if split == "test" else run.validation)[metric]
        for seed, run in sorted(group.runs.items())
    }


def _row(group: Group, split: str, metric: str) -> dict[str, Any]:
    values = _values(group, split, metric)
    return {**spread(values.values()), "values": {str(seed): value for seed, value in values.items()}}


def _put_back(group: Group) -> dict[str, Any] | None:
    losses = {seed: run.put_back["loss"] for seed, run in sorted(group.runs.items()) if "loss" in run.put_back}
    if not losses or len(losses) < len(group.runs):
        return None
    return {**spread(losses.values()), "values": {str(seed): loss for seed, loss in losses.items()}}


def _only(groups: list[Group], algorithm: str, name: str | None = None) -> Group | None:
    """The one row with this method, or this name; of two with the method, neither is the control."""
    found = [group for group in groups if (group.algorithm == algorithm if name is None else group.name == name)]
    return found[0] if len(found) == 1 else None


def _missing(frozen: Group | None, first_order: Group | None) -> str:
    names = [name for name, group in ((FROZEN, frozen), (FIRST_ORDER, first_order)) if group is None]
    return f"needs exactly one finished row of {' and one of '.join(names)}"


def _difference(frozen: dict[int, float], method: dict[int, float]) -> dict[str, float | None]:
    return spread(frozen[seed] - method[seed] for seed in sorted(frozen.keys() & method.keys()))


def _target(target: Target | None, frozen: Group | None) -> tuple[Target | None, str]:
    if target is not None:
        return target, ""
    if frozen is None:
        return None, f"the target is the final validation loss of {FROZEN}, and there is no one row of it"
    return Target("loss", mean(_values(frozen, "validation", "loss").values())), ""


def _reached(group: Group, target: Target | None, mode: str) -> dict[str, Any] | None:
    """Rounds to the target: the mean over seeds if all reached it, and each."""
    if target is None or not group.runs:
        return None
    mode = "min" if target.metric == "loss" else mode
    each = {
        str(seed): first_reaching(run.curve, target.metric, target.value, mode)
        for seed, run in sorted(group.runs.items())
    }
    known = [value for value in each.values() if value is not None]
    return {"mean": mean(known) if len(known) == len(each) else None, "reached": len(known), "values": each}


def _costs(group: Group) -> dict[str, float | None]:
    """Means over seeds; a frozen client trains nothing of what it could."""
    costs = [run.costs | ({"d_client": 0} if group.algorithm == FROZEN else {}) for run in group.runs.values()]
    return {name: _mean(cost[name] for cost in costs) for name in (costs[0] if costs else ())}


def _curve(group: Group) -> list[dict[str, Any]]:
    """Means over seeds at the rounds that all have validated, and the lowest and highest of each metric."""
    curves = [{row["round"]: row for row in run.curve} for run in group.runs.values()]
    if not curves:
        return []
    points = []
    for round in sorted(set.intersection(*(set(curve) for curve in curves))):
        rows = [curve[round] for curve in curves]
        point: dict[str, Any] = {name: _mean(row.get(name) for row in rows) for name in ABSCISSAE}
        for name in sorted(set.intersection(*(set(row) for row in rows)) - set(ABSCISSAE)):
            values = [row[name] for row in rows]
            point[name] = {"mean": mean(values), "low": min(values), "high": max(values)}
        points.append(point)
    return points


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else mean(one for one in known if one is not None)
