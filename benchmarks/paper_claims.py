"""The papers' claims, tried: published models on MR polarity as prompts, beside a frozen and a first-order client.

    python -m benchmarks.paper_claims --data DATA --gemma MODEL --smollm2 MODEL --out docs/results/claims

DATA holds ``mr_polarity``, a MODEL is a GGUF file (unpacked in every run) or a folder of that model. Every cell is one
comparison (``hosfl compare``): the same data, clients, server, rounds and seeds for each row, an equal number of
learning rates a row, chosen on the validation set at seed 0, the test set whole and touched once. A run takes minutes
to half an hour; what is finished is not run again, and the table holds all of it, whichever ``--cells`` are named.
``--list`` shows the cells, ``--seeds 0 1`` runs less of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cells import chosen
from benchmarks.client_learning_cells import ADAMW, ALGORITHMS, FIRST_ORDER, FROZEN, hosfl, known, lora
from hosfl_lightning.compare.command import compare, parse
from hosfl_lightning.compare.settings import Comparison
from hosfl_lightning.compare.table import markdown
from hosfl_lightning.files import write_whole

ROOT = Path(__file__).parent.parent
RECIPES = {"gemma": "gemma3/270m_gguf_hosfl_lora.yaml", "smollm2": "smollm2/135m_gguf_hosfl_lora.yaml"}
#: As in the paper: LoRA of rank 8 on queries and values of both halves.
ATTENTION = ["q_proj", "v_proj"]
#: LoRA of rank 32 on every layer of the server.
WIDE = {"r": 32, "alpha": 64, "target_modules": "all-linear"}
PUBLISHED, PUBLISHED_RATES, EIGHT = "HO-SFL as published", "HO-SFL, published rates", "HO-SFL, 8 probes"
SIDE, FOUR_KB, INT4, ATTENTION_FIRST = (
    "side adapter", "side adapter, 4 KB", "side adapter, int4", "first order, queries and values"
)  # fmt: skip
#: Of both halves, in the paper.
PUBLISHED_RATE = 0.00001
#: Of the side adapter's bottlenecks, and of the strong server's on z.
WIDTH = 16


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        model: Key of `RECIPES`.
        cut: Layers at the client.
        server: ``strong``: LoRA of rank 32 on every layer, and a bottleneck of the side adapter's width on z;
            ``published``: LoRA of rank 8 on queries and values.
        rows: Names.
        server_rate: Every row's; the frozen client tries half of it as well. `PUBLISHED_RATE`: the clients' too.
        seeds: Of data, model and run.
        dtype: Of the model; adapters are fp32.
        rounds: Of 3 clients of 10, 8 sentences each.
        points: Learning rates a row; where one, those that Gemma cut at 12 had chosen.
    """

    model: str
    cut: int
    server: str
    rows: tuple[str, ...]
    server_rate: float
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "bfloat16"
    rounds: int = 100
    points: int = 2

    @property
    def name(self) -> str:
        """Its folder."""
        rates = "_published_rates" if self.server_rate == PUBLISHED_RATE else ""
        return f"{self.model}_cut{self.cut}_{self.server}{rates}_{self.dtype}"


FEW = (FROZEN, FIRST_ORDER, PUBLISHED, FOUR_KB)
LITERAL = (FROZEN, ATTENTION_FIRST, PUBLISHED)
CELLS = [
    Cell("gemma", 12, "strong", FEW, 0.0003), Cell("gemma", 5, "published", LITERAL, 0.001, points=1),
    Cell("smollm2", 20, "strong", FEW, 0.0003), Cell("smollm2", 10, "strong", FEW, 0.0003),
    Cell("gemma", 5, "strong", (*FEW, EIGHT, SIDE, INT4), 0.0003),
    Cell("gemma", 5, "published", LITERAL, PUBLISHED_RATE),
    Cell("gemma", 5, "published", LITERAL, 0.001, dtype="float32"),
]  # fmt: skip


def methods(cell: Cell) -> dict[str, dict[str, Any]]:
    """The rows of a cell, each with as many points."""
    bottleneck, literal = WIDTH if cell.server == "strong" else 0, cell.server_rate == PUBLISHED_RATE
    beside = {"model.init_args.side": {"client": 0, "server": bottleneck}} if bottleneck else {}

    def side(width: int, **more: Any) -> dict[str, Any]:
        return {
            "model.init_args.lora.client": None,
            "model.init_args.side": {"client": width, "server": bottleneck},
        } | more

    def row(algorithm: dict[str, Any], overrides: dict[str, Any], *rates: float) -> dict[str, Any]:
        grid = [{"client_lr": rate} for rate in ([PUBLISHED_RATE] if literal else rates)]
        return {"algorithm": algorithm, "overrides": overrides, "grid": grid}

    servers = [cell.server_rate] if literal else [cell.server_rate, cell.server_rate / 2]
    every_step = {"class_path": f"{ALGORITHMS}.SplitFedSGD", "init_args": {"client_optimizer": ADAMW}}
    exact, attention = known("Uncompressed"), beside | lora(ATTENTION)
    rows = {
        FROZEN: {"algorithm": {"class_path": f"{ALGORITHMS}.Frozen"}, "overrides": attention,
                 "grid": [{"server_lr": rate} for rate in servers]},
        FIRST_ORDER: row(every_step, beside | lora("all-linear"), 0.0003, 0.001),
        ATTENTION_FIRST: row(every_step, attention, 0.0003, 0.001),
        PUBLISHED: row(hosfl(probes=2, distribution="gauss16"), attention, 0.001, 0.0001),
        EIGHT: row(hosfl(probes=8, distribution="gauss16"), attention, 0.001, 0.0001),
        SIDE: row(exact, side(WIDTH), 0.0003, 0.001),
        INT4: row(exact, side(WIDTH, **{"trainer.codec.gradient": "int4"}), 0.0003, 0.001),
        FOUR_KB: row(exact, side(1, **{"trainer.codec.gradient": "ternary"}), 0.001, 0.003),
    }  # fmt: skip
    return {name: rows[name] | {"grid": rows[name]["grid"][: cell.points]} for name in cell.rows}


def comparison(cell: Cell, data: Path, model: str, out: Path) -> Comparison:
    """The settings of a cell."""
    server = WIDE if cell.server == "strong" else {"r": 8, "alpha": 16, "target_modules": ATTENTION}
    files = {"train": "train.jsonl.gz", "test": "test.jsonl.gz", "labels": "labels.json"}
    settings = {
        "out": str(out / "cells" / cell.name), "recipe": str(ROOT / "recipes" / RECIPES[cell.model]),
        "overrides": {
            "model.init_args.pretrained": model, "model.init_args.cut": cell.cut, "model.init_args.dtype": cell.dtype,
            "model.init_args.lora.server": server, "model.init_args.optimizer.init_args.lr": cell.server_rate,
            **{f"data.init_args.{name}": str(data / "mr_polarity" / file) for name, file in files.items()},
        },
        "methods": methods(cell), "budget": {"rounds": cell.rounds}, "metric": "label_word_accuracy", "mode": "max",
        "seeds": [*cell.seeds], "validations": 2, "jobs": 1,
        "first_order": FIRST_ORDER if FIRST_ORDER in cell.rows else ATTENTION_FIRST,
    }  # fmt: skip
    path = out / "cells" / f"{cell.name}.json"
    write_whole(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    return parse(Comparison, "paper_claims", [f"--config={path}"])


def write(out: Path, command: str) -> None:
    """``table.md`` and ``claims.json``, of the cells that are finished, of this call or an earlier one."""
    paths = {cell.name: out / "cells" / cell.name / "results.json" for cell in CELLS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    left = [name for name in paths if name not in found]
    parts = [f"# The papers' claims, tried\n\n`{command}`\n"]
    parts += [f"## {name}\n\n{markdown(results)}" for name, results in found.items()]
    parts += [f"Not run: {', '.join(left)}.\n"] if left else []
    write_whole(out / "table.md", lambda file: file.write("\n".join(parts).encode()))
    content = {"command": command, "cells": found, "cells_left_out": left}
    write_whole(out / "claims.json", lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, refused if a cell has no such name or lacks its data or model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mr_polarity in it")
    for name in RECIPES:
        parser.add_argument(f"--{name}", help="GGUF file or folder of that model, for its cells")
    parser.add_argument("--out", type=Path, help="folder of the runs and the table")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="all unless given")
    parser.add_argument("--seeds", nargs="+", type=int, help="of every cell; more can be given later")
    parser.add_argument("--list", action="store_true", help="the cells' names, and nothing else")
    own = parser.parse_args(args)
    own.cells = chosen(parser, own.cells, CELLS)
    if own.list:
        return own
    if own.out is None or own.data is None or not (own.data / "mr_polarity").is_dir():
        parser.error("give --out, and --data with a folder mr_polarity in it")
    for cell in own.cells:
        model = getattr(own, cell.model)
        if model is None or not Path(model).exists():
            parser.error(f"--{cell.model}: {cell.name} needs it, and {model} is not there")
    return own


def main(args: Sequence[str] | None = None) -> None:
    """Run the cells one after the other; the table grows with each."""
    own = arguments(args)
    if own.list:
        print("\n".join(cell.name for cell in own.cells))
        return
    command = "python -m benchmarks.paper_claims --data DATA --gemma MODEL --smollm2 MODEL --out OUT"
    for number, cell in enumerate(own.cells, 1):
        print(f"cell {number} of {len(own.cells)}: {cell.name}", flush=True)
        settled = replace(cell, seeds=tuple(own.seeds)) if own.seeds else cell
        compare(comparison(settled, own.data, getattr(own, cell.model), own.out), command)
        write(own.out, command)


if __name__ == "__main__":
    main()
