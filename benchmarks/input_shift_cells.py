"""What ``benchmarks.input_shift`` compares: shifts, cells and methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.cells import FIRST_ORDER, FROZEN
from benchmarks.client_learning_cells import ADAMW, ALGORITHMS, hosfl, known

CLIENTS, WIDTHS, SIZE = 8, [16, 32, 64], 28
#: Of the training images: so many are dealt to the clients, and the network is pretrained on none of them.
DEALT, VALIDATED, TESTED = 800, 500, 2000
Rates = tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A model and data, with the learning rates that are tried there.

    Args:
        recipe: Below ``recipes/``.
        overrides: Dotted keys; ``{data}`` and ``{weights}`` are replaced.
        metric: Beside the loss.
        mode: Whether a high or a low metric is good.
        width: Of the strong server's bottleneck on z.
        narrow: Width of the side adapter whose gradient, in three values, fits into 4 KiB a client-round.
        kernel: Of the bottlenecks of both halves.
        server: Three rates of the server.
        first_order: Three rates of a client that knows the gradient of all that it could train.
        norms: Of one that knows its norms'.
        side: Of one that knows its side adapter's.
        zeroth: Of one that estimates, by probes.
        paired: Whether the rows beside the frozen one try all three of the server's rates, the lowest with the lowest
            of their own; else the middle one with each.
        lora: Whether a client without `client_parameters` or side adapter trains LoRA on all projections; else it
            trains all weights.
    """

    recipe: str
    overrides: dict[str, Any]
    metric: str
    mode: str
    width: int
    narrow: int
    kernel: int
    server: Rates
    first_order: Rates
    norms: Rates
    side: Rates
    zeroth: dict[int, Rates]
    paired: bool = False
    lora: bool = False


def images(channels: int) -> Task:
    """The ConvNet that was pretrained on clean images, with two of its three blocks at the client."""
    network = {"channels": channels, "widths": WIDTHS, "num_labels": 10, "image_size": SIZE}
    return Task(
        recipe="vision/digits_hosfl_norm.yaml",
        overrides={
            "model.init_args.network": {"class_path": "hosfl_lightning.networks.ConvNet", "init_args": network},
            "model.init_args.weights": f"{{weights}}/convnet_{channels}.safetensors", "model.init_args.cut": 2,
            "model.init_args.image_size": SIZE, "model.init_args.channels": channels,
            "model.init_args.client_parameters": None,
            "data.class_path": "hosfl_lightning.data.FashionMNISTData", "data.init_args.folder": "{data}/fashion_mnist",
            "data.init_args.channels": channels, "data.init_args.partition": "iid", "data.init_args.alpha": 0.5,
            "data.init_args.batch_size": 16, "data.init_args.max_train_examples": DEALT,
            "data.init_args.max_validation_examples": VALIDATED, "data.init_args.max_test_examples": TESTED,
            "data.init_args.eval_batch_size": 250,
        },
        metric="accuracy", mode="max", width=32, narrow=32, kernel=3,
        server=(0.0005, 0.001, 0.002), first_order=(0.001, 0.003, 0.01), norms=(0.003, 0.01, 0.03),
        side=(0.003, 0.01, 0.03),
        zeroth={2: (0.001, 0.003, 0.01), 8: (0.003, 0.01, 0.03), 32: (0.003, 0.01, 0.03)},
    )  # fmt: skip


TASKS = {
    "grey": images(1),
    "colour": images(3),
    "text": Task(
        recipe="stories260k/shakespeare_hosfl_lora.yaml",
        overrides={
            "model.init_args.pretrained": "{data}/stories260k", "model.init_args.cut": 4,
            "model.init_args.lora.server": {"r": 32, "alpha": 64, "target_modules": "all-linear"},
            "data.init_args.files": "{data}/tinystories_sample/train.jsonl.gz",
            "data.init_args.test_files": "{data}/tinystories_sample/test.jsonl.gz",
            "data.init_args.max_test_examples": 512, "data.init_args.max_validation_examples": 128,
            "data.init_args.batch_size": 4,
        },
        metric="perplexity", mode="min", width=128, narrow=40, kernel=1, lora=True,
        server=(0.0025, 0.005, 0.01), first_order=(0.003, 0.01, 0.03), norms=(0.003, 0.01, 0.03),
        side=(0.003, 0.01, 0.03),
        zeroth={2: (0.0003, 0.001, 0.003), 8: (0.001, 0.003, 0.01), 32: (0.001, 0.003, 0.01)},
    ),
}  # fmt: skip

NORMS = "first order, norms"
SIDE, CONVOLUTION = "side adapter, 4 KB", "HO-SFL on the first convolution, P = 8"
TWO, EIGHT, MANY = (f"HO-SFL on norms, P = {probes}" for probes in (2, 8, 32))
OWN = (OWN_EIGHT, OWN_MANY) = tuple(f"HO-SFL on norms, own directions, P = {probes}" for probes in (8, 32))
PERSONAL = (PERSONAL_EIGHT, PERSONAL_NORMS) = ("personal HO-SFL on norms, P = 8", "personal first order, norms")
ALL = (FROZEN, FIRST_ORDER, NORMS, TWO, EIGHT, MANY, SIDE, CONVOLUTION)
FEW = (FROZEN, FIRST_ORDER, NORMS, EIGHT, MANY, SIDE)


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        name: Its folder.
        title: In tables and pictures.
        task: Name of a `Task`.
        shift: Class of `hosfl_lightning.data.shift` and its settings; None: no shift of the inputs.
        overrides: Dotted keys over the task's.
        rows: Names of methods.
        seeds: Of data, sensors, model and run.
        rounds: Of every run.
        rates: Fields of the `Task` that are others here.
    """

    name: str
    title: str
    task: str = "grey"
    shift: tuple[str, dict[str, Any]] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    rows: tuple[str, ...] = FEW
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 120
    rates: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Task:
        """The task, with the cell's own rates."""
        return replace(TASKS[self.task], **self.rates)

    @property
    def each_client(self) -> bool:
        """Whether every client has a shift of its own, so that personal halves have a point."""
        return self.shift is not None and bool(self.shift[1].get("each_client"))


#: With three of four children at the client the server alone bears a higher rate than beside a client that moves.
DEEP = {
    "paired": True, "server": (0.001, 0.002, 0.004), "first_order": (0.001, 0.002, 0.004), "norms": (0.01, 0.02, 0.04),
    "zeroth": {2: (0.003, 0.006, 0.012), 8: (0.01, 0.02, 0.04), 32: (0.01, 0.02, 0.04)},
}  # fmt: skip
CELLS = [
    Cell("inverted", "inverted contrast, one for all", shift=("Contrast", {"gain": -1.0}), rows=ALL,
         rates={"server": (0.001, 0.002, 0.004), "first_order": (0.003, 0.01, 0.03)}),
    Cell("inverted_deep", "inverted contrast, one for all, cut 3", shift=("Contrast", {"gain": -1.0}),
         overrides={"model.init_args.cut": 3}, rows=(*FEW, *OWN), rates=DEEP),
    Cell("cipher", "TinyStories in a cipher, one for all", "text", ("Cipher", {}), rounds=40,
         rows=(FROZEN, FIRST_ORDER, NORMS, SIDE)),
    Cell("contrast_each", "contrast, each client its own",
         shift=("Contrast", {"gain": -1.0, "offset": 0.3, "each_client": True}),
         rows=(FROZEN, FIRST_ORDER, NORMS, EIGHT)),
    Cell("contrast_each_deep", "contrast, each client its own, cut 3",
         shift=("Contrast", {"gain": -1.0, "offset": 0.3, "each_client": True}),
         overrides={"model.init_args.cut": 3}, rows=(FROZEN, FIRST_ORDER, NORMS, MANY, SIDE), rates=DEEP),
    Cell("labels", "label shift, Dirichlet(0.1), inputs as they are",
         overrides={"data.init_args.partition": "dirichlet", "data.init_args.alpha": 0.1,
                    "data.init_args.min_examples_per_client": 16},
         rows=(FROZEN, FIRST_ORDER, NORMS, EIGHT),
         rates={"server": (0.0001, 0.0003, 0.001), "first_order": (0.0003, 0.001, 0.003)}),
    Cell("noise", "noise, one level for all", shift=("Noise", {"std": 0.4}), rows=(*FEW, *OWN)),
    Cell("pattern_each", "sensor pattern, each client its own",
         shift=("SensorPattern", {"strength": 0.4, "each_client": True}), rows=(*FEW, *OWN)),
    Cell("blur", "blur, one for all", shift=("Blur", {"sigma": 2.0})),
    Cell("colour", "colour cast, each client its own", "colour",
         ("ColourCast", {"gains": [1.0, -0.5, 0.3], "offsets": [0.0, 0.6, 0.3], "each_client": True})),
]  # fmt: skip


def methods(task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a cell: name and method, three rates each."""

    def adapter(client: int) -> dict[str, Any]:
        kernel = {"kernel": task.kernel} if task.kernel > 1 else {}
        return {"model.init_args.side": {"client": client, "server": task.width, **kernel}}

    def chosen(word: str) -> dict[str, Any]:
        return plain | alone | {"model.init_args.client_parameters": word}

    plain, alone = adapter(0), {"model.init_args.lora.client": None} if task.lora else {}
    lora = {"model.init_args.lora.client": {"r": 8, "alpha": 16, "target_modules": "all-linear"}} if task.lora else {}
    in_three = adapter(task.narrow) | alone | {"trainer.codec.gradient": "ternary"}
    yield FROZEN, row({"class_path": f"{ALGORITHMS}.Frozen"}, plain | lora, None, task)
    yield FIRST_ORDER, row(backprop(), plain | lora, task.first_order, task)
    yield NORMS, row(backprop(), chosen("norm"), task.norms, task)
    for name, probes in ((TWO, 2), (EIGHT, 8), (MANY, 32)):
        yield name, row(hosfl(probes=probes), chosen("norm"), task.zeroth[probes], task)
    for name, probes in ((OWN_EIGHT, 8), (OWN_MANY, 32)):
        method = hosfl(probes=probes, directions="client")
        yield name, row(method, chosen("norm"), task.zeroth[probes], task)
    yield SIDE, row(known("Uncompressed"), in_three, task.side, task)
    if not task.lora:
        yield CONVOLUTION, row(hosfl(probes=8), chosen("first_layer"), task.zeroth[8], task)
    yield PERSONAL_EIGHT, row(hosfl(probes=8, personal=True), chosen("norm"), task.zeroth[8], task)
    yield PERSONAL_NORMS, row(backprop(personal=True), chosen("norm"), task.norms, task)


def backprop(**settings: Any) -> dict[str, Any]:
    """A first-order client, averaged every step."""
    return {"class_path": f"{ALGORITHMS}.SplitFedSGD", "init_args": {"client_optimizer": ADAMW, **settings}}


def row(algorithm: dict[str, Any], overrides: dict[str, Any], client: Rates | None, task: Task) -> dict[str, Any]:
    """A method of a comparison."""
    if client is None:
        grid = [{"server_lr": rate} for rate in task.server]
    else:
        server = task.server if task.paired else [task.server[1]] * len(client)
        grid = [{"client_lr": own, "server_lr": rate} for own, rate in zip(client, server)]
    return {"algorithm": algorithm, "overrides": overrides, "grid": grid}
