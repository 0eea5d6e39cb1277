"""What a client's learning is worth: the share of the first-order gap that each method closes, task by task.

    python -m benchmarks.client_learning --data DATA --minilm MODEL --out docs/results/client_learning

DATA holds a folder a data set, MODEL all-MiniLM-L6-v2. Every cell is one comparison (``hosfl compare``): the same data,
partition, server, client samples and seeds for each row, equal rounds, four pairs of learning rates a row chosen on the
validation set at one seed, the test set touched once. What is finished is not run again, and the table holds all of it,
whichever ``--cells`` are named. ``--quick`` makes two cells in minutes, with one pair of learning rates and two seeds:
it shows the table, not the answer. ``--list`` shows the cells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import FIRST_ORDER, chosen, finished, measured, placed, strings
from benchmarks.client_learning_cells import CELLS, QUICK, TASKS, Cell, methods
from benchmarks.client_learning_overview import overview
from benchmarks.client_learning_pictures import draw
from hosfl_lightning.compare.command import compare, parse
from hosfl_lightning.compare.settings import Comparison
from hosfl_lightning.compare.table import markdown
from hosfl_lightning.files import write_whole

ROOT = Path(__file__).parent.parent


def comparison(cell: Cell, places: dict[str, str], out: Path) -> Comparison:
    """The settings of a cell."""
    task, strong = TASKS[cell.task], cell.server == "strong"
    chosen = {name: one for name, one in methods(task, strong) if not cell.rows or name in cell.rows}
    server = {"r": 32, "alpha": 64, "target_modules": "all-linear"} if strong else {
        "r": 8, "alpha": 16, "target_modules": [*task.attention]}  # fmt: skip
    overrides = placed(task.overrides, places) | cell.partition | {
        "model.init_args.cut": cell.cut, "data.init_args.num_clients": cell.clients, "trainer.clients_per_round": None,
        **({"model.init_args.lora.server": server} if task.attention else {}),
    }  # fmt: skip
    settings = {
        "out": str(out / "cells" / cell.name), "recipe": str(ROOT / "recipes" / task.recipe), "overrides": overrides,
        "methods": {name: one | {"grid": one["grid"][: cell.points]} for name, one in chosen.items()},
        "budget": {"rounds": cell.rounds or task.rounds}, "metric": task.metric, "mode": task.mode,
        "seeds": [*cell.seeds], "first_order": FIRST_ORDER, "validations": 4,
    }  # fmt: skip
    path = out / "cells" / f"{cell.name}.json"
    write_whole(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    return parse(Comparison, "client_learning", [f"--config={path}"])


def absent(cells: Sequence[Cell], places: dict[str, str]) -> str:
    """The first file or folder that a cell needs and that is not there, in a line; empty: there is none."""
    for cell in cells:
        for value in strings(TASKS[cell.task].overrides):
            path = value.format(**places)
            if "{" in value and not (path and Path(path).exists()):
                option = "--minilm" if "{minilm}" in value else "--data"
                return f"{option}: {cell.name} needs {value}, and {path!r} is not there"
    return ""


def entries(cell: Cell, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of ``client_learning.json``: those of `measured`, with what the cell is."""
    task = TASKS[cell.task]
    about = {
        "task": cell.task, "server": cell.server, "cut": cell.cut, "clients": cell.clients,
        "partition": cell.partition.get("data.init_args.partition", "iid"),
        "alpha": cell.partition.get("data.init_args.alpha"),
    }  # fmt: skip
    settings = dict(methods(task, cell.server == "strong"))
    return measured(about, settings, results, task.metric, "lora" if task.attention else "all weights")


def write(found: list[tuple[Cell, dict[str, Any]]], out: Path, command: str) -> None:
    """``client_learning.json``, ``table.md`` and the pictures, of the cells that are finished."""
    table = [entry for cell, results in found for entry in entries(cell, results)]
    done, settings = [cell for cell, _ in found], dict(methods(TASKS["shakespeare"], strong=True))
    content = {"command": command, "rows": table, "cells_left_out": [c.name for c in CELLS if c not in done]}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_whole(out / "client_learning.json", lambda file: file.write(text.encode() + b"\n"))
    parts = [f"# What a client's learning is worth\n\n`{command}`\n", overview(table, [*settings])]
    parts += [f"## {cell.name}\n\n{markdown(results)}" for cell, results in found]
    write_whole(out / "table.md", lambda file: file.write("\n".join(parts).encode()))
    draw(table, settings, out)


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, refused if a cell has no such name or lacks its data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with a folder a data set")
    parser.add_argument("--minilm", default="", help="folder of all-MiniLM-L6-v2, for the cells that need it")
    parser.add_argument("--out", type=Path, help="folder of the runs, the table and the pictures")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="all unless given")
    parser.add_argument("--quick", action="store_true", help="two small cells, in minutes")
    parser.add_argument("--list", action="store_true", help="the cells' names, and nothing else")
    own = parser.parse_args(args)
    own.cells = chosen(parser, own.cells, QUICK if own.quick else CELLS)
    if not own.list:
        if own.out is None or not own.data:
            parser.error("give --data and --out")
        if lacks := absent(own.cells, {"data": own.data, "minilm": own.minilm}):
            parser.error(f"{lacks}; give it, or choose other --cells")
    return own


def shown(own: argparse.Namespace) -> str:
    """The command, without the machine's paths."""
    known = QUICK if own.quick else CELLS
    named = [] if own.cells == known else ["--cells", *(cell.name for cell in own.cells)]
    minilm = "--minilm MODEL " if own.minilm else ""
    options = " ".join([*(["--quick"] if own.quick else []), *named])
    return f"python -m benchmarks.client_learning --data DATA {minilm}--out OUT {options}".rstrip()


def main(args: Sequence[str] | None = None) -> None:
    """Run the cells one after the other; the table grows with each."""
    own = arguments(args)
    if own.list:
        print("\n".join(cell.name for cell in own.cells))
        return
    out, command = own.out / "quick" if own.quick else own.out, shown(own)
    for number, cell in enumerate(own.cells, 1):
        print(f"cell {number} of {len(own.cells)}: {cell.name}")
        compare(comparison(cell, {"data": own.data, "minilm": own.minilm}, out), command)
        write(finished(QUICK if own.quick else CELLS, out), out, command)


if __name__ == "__main__":
    main()
