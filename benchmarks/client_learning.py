"""What a client's learning is worth: the share of the first-order gap that each method closes, task by task.

    python -m benchmarks.client_learning --data ../shared/data --minilm MODEL --out docs/results/client_learning

DATA holds a folder a data set, MODEL all-MiniLM-L6-v2. Every cell is one comparison (``hosfl compare``): the same data,
partition, server, client samples and seeds for each row, equal rounds, four learning rates a row chosen on the
validation set at one seed, the test set touched once. What is finished is not run again. ``--quick`` makes two cells in
minutes, with one learning rate and two seeds: it shows the table, not the answer. ``--list`` shows the cells.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hosfl_lightning.compare.command import compare, parse
from hosfl_lightning.compare.settings import Comparison
from hosfl_lightning.compare.table import markdown
from hosfl_lightning.files import write_whole

ROOT = Path(__file__).parent.parent
FROZEN, FIRST_ORDER = "frozen", "first order"
ALGORITHMS = "hosfl_lightning.algorithms"
ADAMW = {"class_path": "hosfl_lightning.optim.AdamW", "init_args": {"weight_decay": 0.0}}


@dataclass(frozen=True)
class Task:
    """A model and data, with the learning rates that are tried there.

    Args:
        recipe: Below ``recipes/``.
        overrides: Dotted keys; ``{data}`` and ``{minilm}`` are replaced.
        metric: Beside the loss.
        mode: Whether a high or a low metric is good.
        rounds: Of every run.
        width: Of each bottleneck of the side adapter, and of the strong server's on z.
        server: Two rates of the server.
        first_order: Two rates of a client that knows its LoRA's (or weights') gradient.
        side: Two rates of a client that knows its side adapter's.
        zeroth: Two rates of a client that estimates.
        attention: Queries and values, where the published settings put LoRA; empty: both halves train all weights.
    """

    recipe: str
    overrides: dict[str, Any]
    metric: str
    mode: str
    rounds: int
    width: int
    server: tuple[float, float]
    first_order: tuple[float, float]
    side: tuple[float, float]
    zeroth: tuple[float, float]
    attention: tuple[str, ...] = ()


def classification(name: str, labels: int) -> dict[str, Any]:
    """MiniLM on a folder of JSON lines."""
    files = {key: f"{{data}}/{name}/{file}" for key, file in (
        ("train", "train.jsonl.gz"), ("test", "test.jsonl.gz"), ("labels", "labels.json"))}  # fmt: skip
    return {
        "model.init_args.pretrained": "{minilm}", "model.init_args.num_labels": labels,
        **{f"data.init_args.{key}": value for key, value in files.items()},
        "data.init_args.max_validation_examples": 256, "data.init_args.max_test_examples": 1024,
        "data.init_args.max_length": 48,
    }  # fmt: skip


TEXT: dict[str, Any] = {
    "recipe": "minilm/banking77_hosfl_lora.yaml", "metric": "accuracy", "mode": "max", "rounds": 60, "width": 64,
    "server": (0.001, 0.003), "first_order": (0.001, 0.003), "side": (0.001, 0.005), "zeroth": (0.0001, 0.0005),
    "attention": ("query", "value"),
}  # fmt: skip
TASKS = {
    "shakespeare": Task(
        recipe="stories260k/shakespeare_hosfl_lora.yaml",
        overrides={
            "model.init_args.pretrained": "{data}/stories260k",
            "data.init_args.files": ["{data}/tinyshakespeare/input.txt"], "data.init_args.test_fraction": 0.1,
            "data.init_args.max_test_examples": 512, "data.init_args.max_validation_examples": 128,
            "data.init_args.batch_size": 8,
        },
        metric="perplexity", mode="min", rounds=150, width=128,
        server=(0.0025, 0.005), first_order=(0.003, 0.01), side=(0.005, 0.015), zeroth=(0.0003, 0.001),
        attention=("q_proj", "v_proj"),
    ),
    "banking77": Task(overrides=classification("banking77", 77), **TEXT),
    "snips": Task(overrides=classification("snips", 7), **TEXT),
    "mr_polarity": Task(overrides=classification("mr_polarity", 2), **TEXT),
    "fashion_mnist": Task(
        recipe="vision/fashion_mnist_hosfl.yaml",
        overrides={
            "model.init_args.pretrained": "{data}/mobilenet_v2", "data.init_args.folder": "{data}/fashion_mnist",
            "model.init_args.image_size": 32, "data.init_args.image_size": 32,
            "data.init_args.max_validation_examples": 256, "data.init_args.max_test_examples": 1000,
        },
        metric="accuracy", mode="max", rounds=60, width=32,
        server=(0.0003, 0.001), first_order=(0.0001, 0.0003), side=(0.001, 0.003), zeroth=(0.00003, 0.0001),
    ),
    "digits": Task(
        recipe="vision/digits_hosfl.yaml", overrides={}, metric="accuracy", mode="max", rounds=150, width=16,
        server=(0.01, 0.02), first_order=(0.005, 0.02), side=(0.005, 0.02), zeroth=(0.001, 0.003),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        task: Name of a `Task`.
        cut: Layers at the client.
        server: ``strong``: wide LoRA on every layer, and a bottleneck of the side adapter's width on z; ``weak``: LoRA
            of rank 8 on queries and values (or, without LoRA, no bottleneck).
        clients: All of them in every round.
        partition: Of classification data.
        rows: Names; empty: all.
        seeds: Of data, model and run.
        rounds: None: the task's.
        points: Learning rates a row.
    """

    task: str
    cut: int
    server: str = "strong"
    clients: int = 8
    partition: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int | None = None
    points: int = 4

    @property
    def name(self) -> str:
        """Its folder."""
        parted = "".join(f"_{value}" for value in self.partition.values())
        return f"{self.task}_cut{self.cut}_{self.server}_{self.clients}clients{parted}"


DIRICHLET = {"data.init_args.partition": "dirichlet", "data.init_args.alpha": 0.3}
IID = {"data.init_args.partition": "iid"}
FEW = (FROZEN, FIRST_ORDER, "HO-SFL as published", "side adapter", "side adapter, int4")
CELLS = [
    Cell("shakespeare", 3, seeds=(0, 1, 2, 3, 4)),
    Cell("shakespeare", 2), Cell("shakespeare", 3, "weak"),
    Cell("shakespeare", 3, clients=1, rows=FEW), Cell("shakespeare", 3, clients=32, rows=FEW),
    Cell("banking77", 4, partition=DIRICHLET), Cell("banking77", 3, partition=IID), Cell("banking77", 2, partition=IID),
    Cell("snips", 4, partition=IID), Cell("mr_polarity", 4, partition=IID),
    Cell("mr_polarity", 4, "weak", partition=IID), Cell("fashion_mnist", 8, partition=DIRICHLET),
    Cell("digits", 2, partition=IID),
]  # fmt: skip
QUICK = [
    Cell("digits", 2, partition=IID, rows=FEW[:4], seeds=(0, 1), rounds=40, points=1),
    Cell("shakespeare", 3, rows=FEW, seeds=(0, 1), rounds=20, points=1),
]


def methods(task: Task, strong: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a cell: name, method, and what the table says of it beside what was measured."""
    width = task.width if strong else 0
    side: dict[str, Any] = {"model.init_args.side": {"client": task.width, "server": width}}
    plain: dict[str, Any] = {"model.init_args.side": {"client": 0, "server": width}} if strong else {}
    if task.attention:
        side |= {"model.init_args.lora.client": None}
        plain |= lora("all-linear")
    every_step, again = (
        {"class_path": f"{ALGORITHMS}.SplitFedSGD", "init_args": {"client_optimizer": ADAMW, "checkpointing": again}}
        for again in (False, True)
    )
    signs = {"trainer.callbacks": [{"class_path": "hosfl_lightning.callbacks.RandomSigns"}]}
    published = plain | (lora([*task.attention]) if task.attention else {})
    yield FROZEN, row({"class_path": f"{ALGORITHMS}.Frozen"}, plain, None, task)
    yield FIRST_ORDER, row(every_step, plain, task.first_order, task)
    yield "first order, checkpointed", row(again, plain, task.first_order, task)
    yield "first order, side adapter", row(every_step, side, task.side, task)
    yield "HO-SFL as published", row(hosfl(probes=2), published, task.zeroth, task)
    yield "HO-SFL, 8 probes", row(hosfl(probes=8), plain, task.zeroth, task)
    yield "side adapter, 8 probes", row(hosfl(probes=8), side, task.zeroth, task)
    yield "side adapter", row(known("Uncompressed"), side, task.side, task)
    yield "side adapter, int4", row(known("Uncompressed"), side | {"trainer.codec.gradient": "int4"}, task.side, task)
    yield "side adapter, 1,024 projections", row(known("RandomProjections", count=1024), side, task.zeroth, task)
    yield "side adapter, 1,024 coordinates", row(known("RandomSubset", count=1024), side, task.side, task)
    yield "side adapter, random signs", row(known("Uncompressed"), side | signs, task.side, task)


def hosfl(**settings: Any) -> dict[str, Any]:
    """HO-SFL with AdamW."""
    return {"class_path": f"{ALGORITHMS}.HOSFL", "init_args": {**settings, "client_optimizer": ADAMW}}


def known(compression: str, **settings: Any) -> dict[str, Any]:
    """HO-SFL of a client that knows its gradient."""
    choice = {"class_path": f"hosfl_lightning.optim.{compression}", "init_args": settings}
    return hosfl(estimator="local", compression=choice)


def lora(targets: str | list[str]) -> dict[str, Any]:
    """The client's LoRA."""
    return {"model.init_args.lora.client": {"r": 8, "alpha": 16, "target_modules": targets}}


def row(
    algorithm: dict[str, Any], overrides: dict[str, Any], client: tuple[float, float] | None, task: Task
) -> dict[str, Any]:
    """A method of a comparison: four pairs of rates, or for a client that has none four of the server."""
    low, high = task.server
    if client is None:
        grid = [{"server_lr": rate} for rate in (low, high, low / 2, high * 2)]
    else:
        grid = [{"client_lr": c, "server_lr": s} for s in task.server for c in client]
    return {"algorithm": algorithm, "overrides": overrides, "grid": grid}


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
        "seeds": [*cell.seeds], "first_order": FIRST_ORDER, "validations": 5,
    }  # fmt: skip
    path = out / "cells" / f"{cell.name}.json"
    write_whole(path, lambda file: file.write(json.dumps(settings, indent=2).encode()))
    return parse(Comparison, "client_learning", [f"--config={path}"])


def placed(value: Any, places: dict[str, str]) -> Any:
    """With ``{data}`` and ``{minilm}`` replaced, at any depth."""
    if isinstance(value, dict):
        return {name: placed(one, places) for name, one in value.items()}
    if isinstance(value, list):
        return [placed(one, places) for one in value]
    return value.format(**places) if isinstance(value, str) else value


def entries(cell: Cell, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of ``client_learning.json``: bytes are a client-round's, forwards those of the client half."""
    task = TASKS[cell.task]
    settings = dict(methods(task, cell.server == "strong"))
    for name, found in results["methods"].items():
        init, gap = settings[name]["algorithm"].get("init_args", {}), found["gap_closed"]
        compression = init.get("compression", {})
        seeds = gap_of_each_seed(results, name)
        yield {
            "task": cell.task, "server": cell.server, "cut": cell.cut, "clients": cell.clients,
            "partition": cell.partition, "method": name,
            "adapter": "side" if settings[name]["overrides"].get("model.init_args.side", {}).get("client") else
            ("lora" if task.attention else "all weights"),
            "estimator": init.get("estimator", "forward" if "probes" in init else None),
            "aggregation": compression.get("class_path", "").rpartition(".")[2] or None,
            "client_backprop": name.startswith(FIRST_ORDER), "d_client": found["d_client"],
            "probes": init.get("probes"),
            "scalars_up": compression.get("init_args", {}).get("count") or init.get("probes") or found["d_client"],
            "bytes_up": found["bytes_up_per_client_round"], "bytes_down": found["bytes_down_per_client_round"],
            "client_peak_bytes": found["client_peak_bytes"], "client_inference_bytes": found["client_inference_bytes"],
            "client_forward_equivalents": found["client_forwards_per_round"],
            "loss": found["loss"], task.metric: found[task.metric], "below_frozen": found["below_frozen"],
            "gap_closed": gap["value"] if gap else None, "gap_closed_interval": gap and [gap["low"], gap["high"]],
            "gap_closed_each_seed": seeds, "no_gap_closed": found["no_gap_closed"],
            "client_put_back": found["client_put_back"], "learning_rate": found["point"], "seeds": found["seeds"],
        }  # fmt: skip


def gap_of_each_seed(results: dict[str, Any], name: str) -> dict[str, float]:
    """(frozen − method) / (frozen − first order) of each seed alone: its spread, where the gap is there."""
    frozen, first, own = (results["methods"][one]["loss"]["values"] for one in (FROZEN, FIRST_ORDER, name))
    return {
        seed: (frozen[seed] - own[seed]) / (frozen[seed] - first[seed]) for seed in own if frozen[seed] != first[seed]
    }


def draw(found: list[tuple[Cell, dict[str, Any]]], path: Path) -> None:
    """Gap closed by method, one column of dots a cell where there is a gap."""
    shown = [(cell, results) for cell, results in found if any(m["gap_closed"] for m in results["methods"].values())]
    if not shown:
        return
    names = [name for name, _ in methods(TASKS["shakespeare"], True) if name not in (FROZEN, FIRST_ORDER)]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.2 + 1.9 * len(shown), 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (cell, results) in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown):
            for place, name in enumerate(reversed(names)):
                gap = results["methods"].get(name, {}).get("gap_closed")
                if gap:
                    axes.plot([100 * gap["low"], 100 * gap["high"]], [place, place], color="#4477aa", linewidth=2)
                    axes.plot(100 * gap["value"], place, "o", color="#332288")
            axes.axvline(0, color="black", linestyle="--", linewidth=1)
            axes.axvline(100, color="#777777", linestyle="-.", linewidth=1)
            axes.set(xlim=(-60, 160), yticks=range(len(names)), yticklabels=names[::-1])
            axes.set_title(f"{cell.task}, cut {cell.cut}\n{cell.server} server, {cell.clients} clients", fontsize=9)
            axes.grid(alpha=0.25)
        figure.supxlabel(
            "gap closed, % (0: frozen client, 100: first-order client; line: 95 % interval over seeds)", fontsize=9
        )
        figure.savefig(path)


def write(found: list[tuple[Cell, dict[str, Any]]], out: Path, command: str) -> None:
    """``client_learning.json``, ``table.md`` and the picture, of the cells that are finished."""
    table = [entry for cell, results in found for entry in entries(cell, results)]
    left = [cell.name for cell in CELLS if cell not in [one for one, _ in found]]
    text = json.dumps({"command": command, "rows": table, "cells_left_out": left}, indent=1, ensure_ascii=False)
    write_whole(out / "client_learning.json", lambda file: file.write(text.encode() + b"\n"))
    parts = [f"# What a client's learning is worth\n\n`{command}`\n"]
    parts += [f"## {cell.name}\n\n{markdown(results)}" for cell, results in found]
    write_whole(out / "table.md", lambda file: file.write("\n".join(parts).encode()))
    draw(found, out / "gap_closed.png")


def main() -> None:
    """Run the cells one after the other; the table grows with each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a folder a data set")
    parser.add_argument("--minilm", default="", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="*", help="names; all unless given")
    parser.add_argument("--quick", action="store_true", help="two small cells, in minutes")
    parser.add_argument("--list", action="store_true", help="the cells' names, and nothing else")
    own = parser.parse_args()
    out = own.out / "quick" if own.quick else own.out
    cells = QUICK if own.quick else [cell for cell in CELLS if not own.cells or cell.name in own.cells]
    if own.list:
        print("\n".join(cell.name for cell in cells))
        return
    command, found = f"python -m benchmarks.client_learning {shlex.join(sys.argv[1:])}", []
    for number, cell in enumerate(cells, 1):
        print(f"cell {number} of {len(cells)}: {cell.name}")
        settings = comparison(cell, {"data": own.data, "minilm": own.minilm}, out)
        found.append((cell, compare(settings, command)))
        write(found, out, command)


if __name__ == "__main__":
    main()
