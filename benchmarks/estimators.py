"""Other estimators beside plain Rademacher directions, at equal forwards: which of them a client should have.

    python -m benchmarks.estimators --data DATA --out docs/results/estimators

A network pretrained on clean Fashion-MNIST whose clients see it inverted, with two or three of its blocks at the
client, whose norms move: 96 or 224 values. Eight clients of a hundred images, sixteen a round, all of them in each of
150 rounds, AdamW on both sides; the lower half is moved by the estimates of ``benchmarks.estimator_arms`` alone. A
row's learning rate is the best of five by the mean validation loss over all seeds; the test images are looked at once.
What is done is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from benchmarks.estimator_arms import ESTIMATORS, PLAIN, Draw, Estimator, Known, Term, exact
from benchmarks.input_shift_pretraining import pretrain
from hosfl_lightning.data import FashionMNISTData
from hosfl_lightning.data.shift import Contrast
from hosfl_lightning.files import write_json, write_whole
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.run.identity import hardware

CLIENTS, HELD, BATCH, ROUNDS, SERVER_RATE = 8, 100, 16, 150, 0.002
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
FROZEN, WHOLE = "control: frozen", "control: backprop, all values"
SUBSPACE, PUBLIC = 16, 512

Images = tuple[Tensor, Tensor]


@dataclass
class Task:
    """One seed of a cell.

    Attributes:
        network: At the start.
        cut: Children of it that are the lower half.
        clients: Images (K, n, C, H, W) and classes (K, n).
        validation: Images and classes.
        test: Images and classes.
        public: Of the server: clean ones.
    """

    network: nn.Sequential
    cut: int
    clients: Images
    validation: Images
    test: Images
    public: Images


def inverted(data: Path, weights: Path, seed: int, cut: int) -> Task:
    """Clean images pretrained the network; ``cut`` of its three blocks are the lower half, whose norms move."""
    settings: dict[str, Any] = {
        "folder": str(data / "fashion_mnist"), "num_clients": CLIENTS, "max_train_examples": CLIENTS * HELD,
        "max_validation_examples": 1000, "max_test_examples": 2000, "batch_size": BATCH, "seed": seed,
    }  # fmt: skip
    clean, shifted = FashionMNISTData(**settings), FashionMNISTData(**settings, shift=Contrast(-1.0))
    network = ConvNet(1, (16, 32, 64), 10, 28)
    network.load_state_dict(safetensors.torch.load_file(weights))
    clean.setup("fit")
    shifted.setup("fit")
    shifted.setup("test")
    held = [_images(shifted, examples[:HELD]) for examples in shifted.clients]
    clients = torch.stack([x for x, _ in held]), torch.stack([y for _, y in held])
    validation, test = _images(shifted, shifted.validation_set), _images(shifted, shifted.test_set)
    return Task(network.eval(), cut, clients, validation, test, _images(clean, clean.validation_set[:PUBLIC]))


#: By name, how many blocks are the client's.
CELLS = {"inverted, cut 2": 2, "inverted, cut 3": 3}


def _images(data: Any, examples: Any) -> Images:
    batch = data.collate(list(examples))
    return batch["pixel_values"], batch["labels"]


class AdamW:
    """Of one vector, without decay."""

    def __init__(self, d: int, rate: float) -> None:
        self.m, self.v, self.steps, self.rate = torch.zeros(d), torch.zeros(d), 0, rate

    def step(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """Where θ is afterwards."""
        self.steps += 1
        self.m.lerp_(gradient, 0.1)
        self.v.lerp_(gradient.square(), 0.001)
        size = (self.v / (1 - 0.999**self.steps)).sqrt() + 1e-8
        return theta - self.rate * self.m / (1 - 0.9**self.steps) / size


class Half:
    """``f(θ, x)``: the lower half, of which θ (d,) is what moves."""

    def __init__(self, lower: nn.Module, trained: str) -> None:
        self.lower = lower
        self.fixed = {name: p.detach().clone() for name, p in lower.named_parameters()}
        self.names = [name for name in self.fixed if trained in name]
        self.sizes = [self.fixed[name].numel() for name in self.names]

    def start(self) -> Tensor:
        """θ before the first round."""
        return torch.cat([self.fixed[name].flatten() for name in self.names])

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = {name: v.view_as(self.fixed[name]) for name, v in zip(self.names, theta.split(self.sizes))}
        return functional_call(self.lower, self.fixed | parts, (x,))


def subspace(half: Half, upper: nn.Module, theta: Tensor, public: Images) -> Tensor:
    """(16, d): the largest right singular vectors of the gradients on the public examples, sixteen a gradient."""
    gradients = []
    for x, y in zip(public[0].split(BATCH), public[1].split(BATCH)):
        leaf = theta.clone().requires_grad_()
        gradients.append(torch.autograd.grad(F.cross_entropy(upper(half(leaf, x)), y), leaf)[0])
    return torch.linalg.svd(torch.stack(gradients), full_matrices=False)[2][:SUBSPACE]


def run(task: Task, estimator: Estimator | None, rate: float, seed: int, whole: bool = False) -> dict[str, float]:
    """Train, and say how far it came: mean losses of validation and test, accuracy of test."""
    children = list(deepcopy(task.network).children())
    half = Half(nn.Sequential(*children[: task.cut]), "" if whole else ".norm.")
    upper, theta = nn.Sequential(*children[task.cut :]), half.start()
    adamw, server = AdamW(len(theta), rate), torch.optim.AdamW(upper.parameters(), SERVER_RATE, weight_decay=0)
    draw = Draw(len(theta), torch.Generator().manual_seed(1000 + seed))
    known = Known(adamw.m, subspace(half, upper, theta, task.public), adamw.step)
    batches = torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        chosen = [torch.randperm(HELD, generator=batches)[:BATCH] for _ in range(CLIENTS)]
        x, y = (torch.cat([t[k, i] for k, i in enumerate(chosen)]) for t in task.clients)
        with torch.no_grad():
            z = half(theta, x)
        leaf = z.clone().requires_grad_()
        server.zero_grad()
        F.cross_entropy(upper(leaf), y).backward()
        assert leaf.grad is not None
        if estimator is not None:
            with torch.no_grad():
                theta = adamw.step(theta, estimator(Term(half, x, leaf.grad, z, CLIENTS), theta, draw, known))
        server.step()
    with torch.no_grad():
        outputs = {name: upper(half(theta, images[0])) for name, images in _held(task).items()}
    losses = {name: float(F.cross_entropy(out, _held(task)[name][1])) for name, out in outputs.items()}
    accuracy = float((outputs["test"].argmax(1) == task.test[1]).float().mean())
    return losses | {"accuracy": accuracy, "d": len(theta)}


def _held(task: Task) -> dict[str, Images]:
    return {"validation": task.validation, "test": task.test}


def rows() -> dict[str, tuple[Estimator | None, tuple[float, ...], bool]]:
    """Of a table: estimator, rates, and whether all of the half moves."""
    tried = {name: (estimator, RATES, False) for name, estimator in ESTIMATORS.items()}
    return {FROZEN: (None, (0.0,), False), **tried, WHOLE: (exact, tuple(rate / 3 for rate in RATES), True)}


def measure(cell: str, data: Path, weights: Path, seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """A line a run, in ``cell.jsonl`` as it comes."""
    path = out / f"{cell.replace(', ', '_').replace(' ', '')}.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(line["row"], line["rate"], line["seed"]) for line in done}
    plan = [(seed, name, rate) for seed in seeds for name, (_, rates, _) in rows().items() for rate in rates]
    left = [one for one in plan if (one[1], one[2], one[0]) not in known]
    tasks: dict[int, Task] = {}
    with path.open("a") as file:
        for seed, name, rate in tqdm(left, desc=cell, unit="run"):
            estimator, _, whole = rows()[name]
            if seed not in tasks:
                tasks = {seed: inverted(data, weights, seed, CELLS[cell])}
            begun = time.process_time()
            found = run(tasks[seed], estimator, rate, seed, whole)
            line = {"row": name, "rate": rate, "seed": seed, **found, "seconds": time.process_time() - begun}
            file.write(json.dumps(line) + "\n")
            file.flush()
            done.append(line)
    return [line for line in done if line["seed"] in seeds]


def chosen(lines: list[dict[str, Any]], row: str) -> tuple[float, dict[int, dict[str, Any]]]:
    """The rate with the lowest mean validation loss, and its runs by seed."""
    by_rate: dict[float, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["row"] == row:
            by_rate.setdefault(line["rate"], {})[line["seed"]] = line
    rate = min(by_rate, key=lambda r: fmean(line["validation"] for line in by_rate[r].values()))
    return rate, by_rate[rate]


def table(cell: str, lines: list[dict[str, Any]]) -> str:
    """Markdown: test loss, share of the gap to backprop on the same values, and the difference to plain."""
    found = {row: chosen(lines, row) for row in rows()}
    mean = {row: fmean(line["test"] for line in runs.values()) for row, (_, runs) in found.items()}
    best = "control: backprop, same values"
    d = next(int(line["d"]) for line in lines if line["row"] == PLAIN)
    head = [
        "",
        f"| {cell}, d = {d} | rate | test loss | accuracy | gap closed | loss − {PLAIN} |",
        "|---|---|---|---|---|---|",
    ]
    body = []
    for row, (rate, runs) in found.items():
        share = (mean[FROZEN] - mean[row]) / (mean[FROZEN] - mean[best])
        accuracy = fmean(line["accuracy"] for line in runs.values())
        edge = " (edge)" if row != FROZEN and rate in (rows()[row][1][0], rows()[row][1][-1]) else ""
        differences = [line["test"] - found[PLAIN][1][seed]["test"] for seed, line in runs.items()]
        other = "–" if row == PLAIN else interval(differences)
        body.append(f"| {row} | {rate:.3g}{edge} | {mean[row]:.4f} | {accuracy:.1%} | {share:.0%} | {other} |")
    return "\n".join([*head, *body])


def interval(values: list[float]) -> str:
    """Mean and 95 % by Student's t."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):+.4f} ± {half:.4f}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds fashion_mnist")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / "convnet_1.safetensors"
    if not weights.exists():
        print(f"pretrained: {pretrain(str(args.data / 'fashion_mnist'), 1, weights):.1%} of clean images")
    results = {cell: measure(cell, args.data, weights, args.seeds, args.out) for cell in args.cells}
    tables = [table(cell, lines) for cell, lines in results.items()]
    text = (
        f"Seeds {' '.join(map(str, args.seeds))}, {datetime.now(UTC):%Y-%m-%d}, {hardware(torch.device('cpu'))}.\n"
        + "\n".join(tables)
    )
    print(text)
    write_whole(args.out / "table.md", lambda file: file.write((text + "\n").encode()))
    write_json(args.out / "estimators.json", results)


if __name__ == "__main__":
    main()
