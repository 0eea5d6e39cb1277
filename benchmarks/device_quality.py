"""What a client's half in 8 or 4 bits does to training: shipped recipes with every client an exported half.

    python -m benchmarks.device_quality --out docs/results/device_quality

tiny_lm is recipes/quickstart.yaml, eight clients with the docstrings of a package each, who train its side adapter or
LoRA by two probes (its control *HO-SFL as published*); digits is recipes/vision/digits_hosfl_norm.yaml with three of
the network's four children at the client, whose norms eight probes train. Each as PyTorch's client, and as
`hosfl_client` endpoints over ONNX Runtime on a half in fp32, int8 and int4, whose messages travel as bytes; frozen and
first-order clients stand beside them. Learning rates are the recipes'. What is finished is not run again:
``device_quality.json`` holds every run. ``--quick`` is two rounds of three rows: it shows the table, not the answer.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file

from benchmarks.device_fleet import DeviceFleet, Devices
from benchmarks.device_quality_page import page
from benchmarks.device_quality_rows import QUICK, ROWS, Row
from benchmarks.rows import load, write
from hosfl_client.codecs import Coded
from hosfl_client.half import OnnxHalf
from hosfl_client.known_gradient import known_gradient
from hosfl_lightning.device.command import main as export
from hosfl_lightning.recipe import HOSFLCommand, command
from hosfl_lightning.run.identity import starts

SEEDS = [0, 1, 2]


def run(row: Row, seed: int, quick: bool, half: Path | None, folder: Path) -> dict[str, Any]:
    """One run: validation loss before and after, by the server's fp32 replica of the client half.

    ``on_devices`` are the same with z from the half that the clients have, and ``scalars`` what was averaged of their
    probes, round after round; None of PyTorch's clients.
    """
    began = time.process_time()
    done: Any = fit(written(row.recipe(seed, quick, folder), folder / "recipe.yaml"), half)
    trainer, fleet = done.trainer, done.trainer.fleet
    devices = isinstance(fleet, DeviceFleet)
    if devices:
        fleet.check_same()
    return {
        "row": row.name, "seed": seed, "rounds": trainer.global_step,
        "before": trainer.summary["val_loss_first"], "after": trainer.summary["val_loss_last"],
        "on_devices": on_devices(Path(trainer.log_dir) / "metrics.csv") if devices else None,
        "scalars": " ".join(f"{value:.6g}" for value in fleet.scalars) if devices else None,
        "server_start": done.started["server_half"]["weights"], "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def fit(recipe: Path, half: Path | None) -> HOSFLCommand:
    """``hosfl fit``, with devices in the place of its clients where there is an exported half."""

    class Fit(HOSFLCommand):
        def before_fit(self) -> None:
            self.started = starts(self.model.trained_state())
            if half is not None:
                trainer: Any = self.trainer
                trainer.serving = Devices(half, trainer)

    return command(["fit", f"--config={recipe}"], Fit)


def on_devices(path: Path) -> list[float]:
    """Validation loss before and after, of z that the devices sent."""
    with path.open(newline="") as file:
        found = [row["val_clients/loss"] for row in csv.DictReader(file) if row["val_clients/loss"]]
    return [float(found[0]), float(found[-1])]


def written(recipe: dict[str, Any], path: Path) -> Path:
    """The recipe as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


class Halves:
    """Exported halves, made when they are asked for.

    Args:
        folder: For their files.
        quick: As of the runs.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick

    def __call__(self, row: Row, seed: int) -> Path | None:
        """``phone.onnx`` of a row; None: its clients are PyTorch's. The digits' network is another with each seed."""
        if row.engine == "torch":
            return None
        weights = seed if row.task == "digits" else 0
        path = self.folder / row.name / str(weights) / "phone.onnx"
        if not path.is_file():
            recipe = written(row.recipe(weights, self.quick, self.folder), path.parent / "recipe.yaml")
            quantize = "none" if row.engine == "fp32" else row.engine
            export([f"--config={recipe}", f"--out={path}", f"--quantize={quantize}"])
        return path

    def figures(self, row: Row, seed: int) -> dict[str, Any]:
        """Bytes of the graph, and how far what a client sends is what it should send.

        ``probes``: correlation with the exact derivative, over directions; ``cosine``: of the side adapter's gradient
        with that of the half in fp32, at the start and for a Gaussian λ.
        """
        path = self(row, seed)
        assert path is not None
        found = {"bytes": path.stat().st_size, "probes": OnnxHalf(path, 1).manifest.figures["probes"], "cosine": None}
        if row.client == "side":
            reference = self(Row(row.task, row.client, "fp32"), seed)
            assert reference is not None
            own, other = (gradient(one, reference) for one in (path, reference))
            found["cosine"] = float(own @ other / np.sqrt((own @ own) * (other @ other)))
        return found


def gradient(half: Path, recorded: Path) -> np.ndarray[Any, Any]:
    """The side adapter's gradient, on the batch and λ that were recorded beside another half; fp64."""
    engine, held = OnnxHalf(half, threads=1), load_file(recorded.with_suffix(".check.safetensors"))
    batch = {one.name: held[one.name] for one in engine.manifest.inputs}
    mask, multiplier = batch["attention_mask"].astype(bool), held["multiplier"]
    coded = Coded("fp32", "float32", multiplier.shape[1], multiplier)
    found = known_gradient(engine, engine.manifest, batch, coded, mask)
    return np.concatenate([one.reshape(-1) for one in found]).astype(np.float64)


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=f"of {', '.join(names)}; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2; --quick: 0")
    parser.add_argument("--quick", action="store_true", help="two rounds of three rows, in seconds")
    own = parser.parse_args(args)
    own.rows = [Row.of(name) for name in own.rows or ()] or (QUICK if own.quick else ROWS)
    own.seeds = own.seeds or (SEEDS[:1] if own.quick else SEEDS)
    own.out = own.out / "quick" if own.quick else own.out
    return own


def main(args: Sequence[str] | None = None) -> None:
    """Seed after seed; the table grows with each run."""
    own = arguments(args)
    own.out.mkdir(parents=True, exist_ok=True)
    path = own.out / "device_quality.json"
    found = {"halves": {}} | load(path)
    words = "python -m benchmarks.device_quality --out OUT" + (" --quick" if own.quick else "")
    done = {(one["row"], one["seed"]) for one in found["runs"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        halves = Halves(folder / "halves", own.quick)
        for seed, row in ((seed, row) for seed in own.seeds for row in own.rows if (row.name, seed) not in done):
            half = halves(row, seed)
            if half is not None and row.name not in found["halves"]:
                found["halves"][row.name] = halves.figures(row, seed)
            found["runs"].append(run(row, seed, own.quick, half, folder / f"run_{seed}" / row.name))
            print(json.dumps({**found["runs"][-1], "scalars": None}), flush=True)
            write(found, path, words, [row.name for row in ROWS], page)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    main()
