"""What ``benchmarks.client_learning`` compares: tasks, cells and methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cells import FIRST_ORDER, FROZEN

ALGORITHMS = "hosfl_lightning.algorithms"
ADAMW = {"class_path": "hosfl_lightning.optim.AdamW", "init_args": {"weight_decay": 0.0}}


Rates = tuple[float, float]


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
        narrow: Width of the side adapter whose gradient, in three values, fits into 4 KiB a client-round.
        in_three: Two rates of that.
        kernel: Of the bottlenecks of both halves, on feature maps.
        attention: Queries and values, where the published settings put LoRA; empty: both halves train all weights.
    """

    recipe: str
    overrides: dict[str, Any]
    metric: str
    mode: str
    rounds: int
    width: int
    server: tuple[float, float]
    first_order: Rates
    side: Rates
    zeroth: Rates
    narrow: int
    in_three: Rates
    kernel: int = 1
    attention: tuple[str, ...] = ()


def classification(name: str, labels: int) -> dict[str, Any]:
    """MiniLM on a folder of JSON lines."""
    files = {key: f"{{data}}/{name}/{file}" for key, file in (
        ("train", "train.jsonl.gz"), ("test", "test.jsonl.gz"), ("labels", "labels.json"))}  # fmt: skip
    return {
        "model.init_args.pretrained": "{minilm}", "model.init_args.num_labels": labels,
        **{f"data.init_args.{key}": value for key, value in files.items()},
        "data.init_args.max_validation_examples": 192, "data.init_args.max_test_examples": 512,
        "data.init_args.max_length": 32,
    }  # fmt: skip


TEXT: dict[str, Any] = {
    "recipe": "minilm/banking77_hosfl_lora.yaml", "metric": "accuracy", "mode": "max", "rounds": 60, "width": 16,
    "server": (0.0015, 0.003), "first_order": (0.0005, 0.0015), "side": (0.0003, 0.001), "zeroth": (0.0001, 0.0005),
    "narrow": 5, "in_three": (0.001, 0.003), "attention": ("query", "value"),
}  # fmt: skip
SENTIMENT = TEXT | {"rounds": 150, "server": (0.0007, 0.0015), "side": (0.001, 0.002)}
TASKS = {
    "shakespeare": Task(
        recipe="stories260k/shakespeare_hosfl_lora.yaml",
        overrides={
            "model.init_args.pretrained": "{data}/stories260k",
            "data.init_args.files": ["{data}/tinyshakespeare/input.txt"], "data.init_args.test_fraction": 0.1,
            "data.init_args.max_test_examples": 512, "data.init_args.max_validation_examples": 128,
            "data.init_args.batch_size": 8,
        },
        metric="perplexity", mode="min", rounds=100, width=128,
        server=(0.0025, 0.005), first_order=(0.006, 0.012), side=(0.01, 0.02), zeroth=(0.0001, 0.001),
        narrow=64, in_three=(0.005, 0.01), attention=("q_proj", "v_proj"),
    ),
    "banking77": Task(overrides=classification("banking77", 77), **TEXT),
    "snips": Task(overrides=classification("snips", 7), **TEXT),
    "mr_polarity": Task(overrides=classification("mr_polarity", 2) | {
        "data.init_args.max_validation_examples": 400, "data.init_args.max_test_examples": None}, **SENTIMENT),
    "fashion_mnist": Task(
        recipe="vision/fashion_mnist_hosfl.yaml",
        overrides={
            "model.init_args.pretrained": "{data}/mobilenet_v2", "data.init_args.folder": "{data}/fashion_mnist",
            "model.init_args.image_size": 32, "data.init_args.image_size": 32,
            "data.init_args.max_validation_examples": 256, "data.init_args.max_test_examples": 1000,
        },
        metric="accuracy", mode="max", rounds=100, width=32,
        server=(0.00015, 0.0003), first_order=(0.0001, 0.0003), side=(0.0005, 0.0015), zeroth=(0.00001, 0.0001),
        narrow=6, in_three=(0.001, 0.003),
    ),
    "digits": Task(
        recipe="vision/digits_hosfl.yaml", overrides={}, metric="accuracy", mode="max", rounds=150, width=40,
        server=(0.005, 0.01), first_order=(0.008, 0.02), side=(0.008, 0.02), zeroth=(0.0005, 0.003),
        narrow=40, in_three=(0.008, 0.02), kernel=3,
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
        partition: Of classification data; text is dealt at random.
        rows: Names; empty: all.
        seeds: Of data, model and run.
        rounds: None: the task's.
        points: Pairs of learning rates a row.
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
FEW = (FROZEN, FIRST_ORDER, "HO-SFL as published", "side adapter")
SMALL = (*FEW, "side adapter, 4 KB")
CHECKPOINTED, INT4, COORDINATES, SIGNS = (
    "first order, checkpointed", "side adapter, int4", "side adapter, 1,024 coordinates", "side adapter, random signs"
)  # fmt: skip
#: Where a round costs milliseconds.
MANY = (
    *SMALL, CHECKPOINTED, "first order, side adapter", "HO-SFL, 8 probes", "side adapter, 8 probes", INT4, COORDINATES,
    SIGNS,
)  # fmt: skip
FIVE = (0, 1, 2, 3, 4)
CELLS = [
    Cell("shakespeare", 3, rows=(*SMALL, CHECKPOINTED, INT4, COORDINATES, SIGNS), seeds=FIVE),
    Cell("digits", 3, partition=IID, rows=MANY, seeds=FIVE), Cell("digits", 3, "weak", partition=IID, rows=SMALL),
    Cell("digits", 3, partition=DIRICHLET, rows=SMALL), Cell("digits", 3, clients=1, partition=IID, rows=SMALL),
    Cell("digits", 3, clients=32, partition=IID, rows=SMALL), Cell("digits", 2, partition=IID, rows=FEW),
    Cell("fashion_mnist", 13, partition=IID, rows=SMALL), Cell("mr_polarity", 5, partition=IID, rows=SMALL),
    Cell("banking77", 5, partition=IID, rows=SMALL, rounds=120),
    Cell("banking77", 4, partition=DIRICHLET, rows=(*FEW, COORDINATES)),
    Cell("snips", 4, partition=IID, rows=(*FEW, COORDINATES)),
    Cell("fashion_mnist", 8, partition=DIRICHLET, rows=FEW),
    Cell("shakespeare", 2, rows=FEW), Cell("shakespeare", 3, "weak", rows=FEW),
]  # fmt: skip
QUICK = [
    Cell("digits", 2, partition=IID, rows=FEW, seeds=(0, 1), rounds=40, points=1),
    Cell("shakespeare", 3, rows=FEW, seeds=(0, 1), rounds=20, points=1),
]


def methods(task: Task, strong: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a cell: name, method, and what the table says of it beside what was measured."""
    width = task.width if strong else 0

    def adapter(client: int) -> dict[str, Any]:
        kernel = {"kernel": task.kernel} if task.kernel > 1 else {}
        return {"model.init_args.side": {"client": client, "server": width, **kernel}}

    side, plain = adapter(task.width), adapter(0) if strong else {}
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
    three = side | adapter(task.narrow) | {"trainer.codec.gradient": "ternary"}
    yield "side adapter, 4 KB", row(known("Uncompressed"), three, task.in_three, task)
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


def row(algorithm: dict[str, Any], overrides: dict[str, Any], client: Rates | None, task: Task) -> dict[str, Any]:
    """A method of a comparison: four pairs of rates, or for a client that has none four of the server."""
    low, high = task.server
    if client is None:
        rates = (low, high, (low + high) / 2, low / 2)
        grid = [{"server_lr": round(rate, 8)} for rate in rates]
    else:
        grid = [{"client_lr": c, "server_lr": s} for s in task.server for c in client]
    return {"algorithm": algorithm, "overrides": overrides, "grid": grid}
