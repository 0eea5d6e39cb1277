"""The first table of ``benchmarks.client_learning``: a line a cell, what each method closes of its gap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.client_learning_cells import FIRST_ORDER, FROZEN, TASKS, methods
from hosfl_lightning.compare.table import NONE, pm, share

NO_GAP, DIVERGED = "no gap", "failed"


def overview(rows: Iterable[dict[str, Any]]) -> str:
    """A line a cell: both controls' losses, then the gap closed by each method, with its interval over seeds.

    Args:
        rows: Of ``client_learning.json``.
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(title(row), {})[row["method"]] = row
    there = {name for found in cells.values() for name in found} - {FROZEN, FIRST_ORDER}
    names = [name for name, _ in methods(next(iter(TASKS.values())), strong=True) if name in there]
    head = ["task", "metric", FROZEN, FIRST_ORDER, *names]
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    lines = [head, rule, *(_line(name, found, names) for name, found in cells.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def title(row: dict[str, Any]) -> str:
    """The cell of a row in words."""
    skew = "" if row["alpha"] is None else f", {row['partition']}({row['alpha']})"
    clients = "1 client" if row["clients"] == 1 else f"{row['clients']} clients"
    return f"{row['task']}, cut {row['cut']}, {row['server']} server, {clients}{skew}"


def _line(name: str, found: dict[str, dict[str, Any]], names: list[str]) -> list[str]:
    split = next(iter(found.values()))["split"]
    controls = [pm(found[one]["loss"]) if one in found else NONE for one in (FROZEN, FIRST_ORDER)]
    return [name, f"{split} loss", *controls, *(_closed(found.get(one)) for one in names)]


def _closed(row: dict[str, Any] | None) -> str:
    """Of a row that is not in a cell nothing is said; one that diverged is not one without a gap."""
    if row is None:
        return NONE
    if row["gap_closed"] is None:
        return NO_GAP if row["seeds"] else DIVERGED
    low, high = row["gap_closed_interval"]
    return share({"value": row["gap_closed"], "low": low, "high": high})
