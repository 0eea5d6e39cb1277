"""Where a client has something to learn below the cut: inputs that no model was trained on.

    python -m benchmarks.input_shift --data DATA --out docs/results/input_shift

DATA holds a folder a data set. First a ConvNet is pretrained on clean Fashion-MNIST (a minute or two, once); then every
cell is one comparison (``hosfl compare``) of what clients do about a shift: the same data, sensors, server, client
samples and seeds for each row, equal rounds, three learning rates a row chosen on the validation set at one seed, the
test set touched once. What is finished is not run again; the table holds all of it, whichever ``--cells`` are named.
``--personal`` adds, in the cells where every client has its own shift, rows whose client halves are personal.
``--quick`` is one cell in a few rounds: it shows the table, not the answer. ``--list`` shows the cells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.cells import FIRST_ORDER, FROZEN, chosen, finished, measured, placed, strings
from benchmarks.client_learning_overview import overview
from benchmarks.client_learning_pictures import draw
from benchmarks.input_shift_cells import CELLS, CLIENTS, EIGHT, PERSONAL, SIDE, TASKS, Cell, methods
from benchmarks.input_shift_pretraining import pretrain
from hosfl_lightning.compare.command import compare, parse
from hosfl_lightning.compare.settings import Comparison
from hosfl_lightning.compare.table import markdown
from hosfl_lightning.files import write_json, write_whole

ROOT = Path(__file__).parent.parent
QUICK = [replace(CELLS[0], rows=(FROZEN, FIRST_ORDER, EIGHT, SIDE), seeds=(0, 1), rounds=4)]


def comparison(cell: Cell, places: dict[str, str], out: Path, personal: bool = False) -> Comparison:
    """The settings of a cell."""
    task = cell.settings
    rows = (*cell.rows, *(PERSONAL if personal and cell.each_client else ()))
    overrides = placed(task.overrides, places) | cell.overrides | {
        "data.init_args.num_clients": CLIENTS, "trainer.clients_per_round": None,
    }  # fmt: skip
    if cell.shift is not None:
        kind, settings = cell.shift
        shift = {"class_path": f"hosfl_lightning.data.shift.{kind}", "init_args": settings}
        overrides["data.init_args.shift"] = shift
    settings = {
        "out": str(out / "cells" / cell.name), "recipe": str(ROOT / "recipes" / task.recipe), "overrides": overrides,
        "methods": {name: method for name, method in methods(task) if name in rows},
        "budget": {"rounds": cell.rounds}, "metric": task.metric, "mode": task.mode, "seeds": [*cell.seeds],
        "first_order": FIRST_ORDER, "validations": 3, "jobs": 1,
    }  # fmt: skip
    path = out / "cells" / f"{cell.name}.json"
    write_whole(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    return parse(Comparison, "input_shift", [f"--config={path}"])


def entries(cell: Cell, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``input_shift.json``: those of `measured`, with what the cell is."""
    task = cell.settings
    about = {"title": cell.title, "cell": cell.name, "task": cell.task, "shift": cell.shift, "clients": CLIENTS}
    plain = "lora" if task.lora else "all weights"
    return [*measured(about, dict(methods(task)), results, task.metric, plain)]


def write(found: list[tuple[Cell, dict[str, Any]]], out: Path, command: str) -> None:
    """``input_shift.json``, ``table.md`` and the pictures, of the cells that are finished."""
    table, settings = [row for cell, results in found for row in entries(cell, results)], dict(methods(TASKS["grey"]))
    done = [cell for cell, _ in found]
    content = {
        "command": command, "made": {cell.name: results["made"] for cell, results in found}, "rows": table,
        "cells_left_out": [cell.name for cell in CELLS if cell not in done],
    }  # fmt: skip
    write_json(out / "input_shift.json", content, indent=1)
    parts = [f"# Input shift\n\n`{command}`\n", overview(table, [*settings])]
    parts += [f"## {cell.title}\n\n{markdown(results)}" for cell, results in found]
    write_whole(out / "table.md", lambda file: file.write("\n".join(parts).encode()))
    draw(table, settings, out)


def weights(data: str, out: Path, channels: Literal[1, 3]) -> None:
    """Pretrain, unless that is done."""
    path = out / f"convnet_{channels}.safetensors"
    if not path.is_file():
        print(f"Pretraining on clean images of {channels} channel(s)", flush=True)
        accuracy = pretrain(f"{data}/fashion_mnist", channels, path)
        write_json(path.with_suffix(".json"), {"accuracy on 2,000 clean validation images": accuracy})


def absent(cells: Sequence[Cell], data: str) -> str:
    """The first file or folder that a cell needs and that is not there, in a line; empty: there is none."""
    for cell in cells:
        for value in strings(TASKS[cell.task].overrides):
            if value.startswith("{data}") and not Path(path := value.format(data=data)).exists():
                return f"--data: {cell.name} needs {path!r}, and that is not there; give it, or choose other --cells"
    return ""


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, refused if a cell has no such name or lacks its data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="folder with a folder a data set")
    parser.add_argument("--out", type=Path, help="folder of the runs, the table and the picture")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="all unless given")
    parser.add_argument("--personal", action="store_true", help="rows with personal client halves as well")
    parser.add_argument("--quick", action="store_true", help="one small cell, in a minute")
    parser.add_argument("--list", action="store_true", help="the cells' names, and nothing else")
    own = parser.parse_args(args)
    own.cells = chosen(parser, own.cells, QUICK if own.quick else CELLS)
    if not own.list:
        if own.out is None or not own.data:
            parser.error("give --data and --out")
        if lacks := absent(own.cells, own.data):
            parser.error(lacks)
    return own


def shown(own: argparse.Namespace) -> str:
    """The command, without the machine's paths."""
    named = [] if own.cells == (QUICK if own.quick else CELLS) else ["--cells", *(cell.name for cell in own.cells)]
    flags = [f"--{name}" for name in ("quick", "personal") if getattr(own, name)]
    return " ".join(["python -m benchmarks.input_shift --data DATA --out OUT", *flags, *named])


def main(args: Sequence[str] | None = None) -> None:
    """Run the cells one after the other; the table grows with each."""
    own = arguments(args)
    if own.list:
        print("\n".join(cell.name for cell in own.cells))
        return
    out, command = own.out / "quick" if own.quick else own.out, shown(own)
    out.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(own.cells, 1):
        print(f"cell {number} of {len(own.cells)}: {cell.name}", flush=True)
        if cell.task != "text":
            weights(own.data, out, 1 if cell.task == "grey" else 3)
        compare(comparison(cell, {"data": own.data, "weights": str(out)}, out, own.personal), command)
        write(finished(QUICK if own.quick else CELLS, out), out, command)


if __name__ == "__main__":
    main()
