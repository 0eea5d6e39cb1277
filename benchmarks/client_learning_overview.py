"""The first tables of ``benchmarks.client_learning``: a line a cell, what each method closes of its gap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cells import FIRST_ORDER, FROZEN
from hosfl_lightning.compare.table import NONE, pm, share

#: Columns of a table at most.
WIDTH = 7
NO_GAP, DIVERGED = "no gap", "failed"


def overview(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """A line a cell: both controls' losses, then the gap closed by each method, with its interval over seeds.

    As many tables as it takes, of `WIDTH` columns at most: first the methods that most cells have. Of the later ones a
    line is there only if it says something.

    Args:
        rows: Of `measured`.
        names: Methods, in the order in which they are shown.
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(title(row), {})[row["method"]] = row
    count = {name: sum(name in found for found in cells.values()) for name in names}
    shown = sorted((n for n in names if count[n] and n not in (FROZEN, FIRST_ORDER)), key=lambda name: -count[name])
    first, rest = shown[: WIDTH - 3], shown[WIDTH - 3 :]
    tables = [[FROZEN, FIRST_ORDER, *first], *(rest[n : n + WIDTH - 1] for n in range(0, len(rest), WIDTH - 1))]
    return "\n".join([f"{_words(cells)}\n", *(_table(cells, columns) for columns in tables)])


def _words(cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    splits = sorted({row["split"] for found in cells.values() for row in found.values()})
    return (
        f"Both controls' {' or '.join(splits)} loss, then the gap closed by each method, with its interval over seeds:"
    )


def _table(cells: dict[str, dict[str, dict[str, Any]]], columns: list[str]) -> str:
    lines = [["task", *columns], ["---", *["---:"] * len(columns)]]
    for name, found in cells.items():
        if any(one in found for one in columns):
            lines.append([name, *(_cell(one, found.get(one)) for one in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def title(row: dict[str, Any]) -> str:
    """The cell of a row in words, of its own where it has such."""
    if "title" in row:
        return str(row["title"])
    skew = "" if row["alpha"] is None else f", {row['partition']}({row['alpha']})"
    clients = "1 client" if row["clients"] == 1 else f"{row['clients']} clients"
    return f"{row['task']}, cut {row['cut']}, {row['server']} server, {clients}{skew}"


def _cell(name: str, row: dict[str, Any] | None) -> str:
    """Of a row that is not in a cell nothing is said; one that diverged is not one without a gap."""
    if row is None:
        return NONE
    if name in (FROZEN, FIRST_ORDER):
        return pm(row["loss"])
    if row["gap_closed"] is None:
        return NO_GAP if row["seeds"] else DIVERGED
    low, high = row["gap_closed_interval"]
    return share({"value": row["gap_closed"], "low": low, "high": high})
