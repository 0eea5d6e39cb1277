"""What a client's half in 8 or 4 bits does to training: the quickstart with every client an exported half.

    python -m benchmarks.device_quality --out docs/results/device_quality

The recipe is recipes/quickstart.yaml: tiny_lm, eight clients with the docstrings of a package each, 40 rounds, its
learning rates in every row. The client is its side adapter, or LoRA on queries and values with eight probes (the
recipe's control *HO-SFL as published* has two); each as PyTorch's client, and as eight `hosfl_client` endpoints over
ONNX Runtime on a half in fp32, int8 and int4, whose messages travel as bytes. Frozen and first-order clients stand
beside them. What is finished is not run again: ``device_quality.json`` holds every run. ``--quick`` is two rounds of
three rows on two clients: it shows the table, not the answer.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file

from benchmarks.device_fleet import DeviceFleet, Devices
from benchmarks.device_quality_page import page
from hosfl_client.codecs import Coded
from hosfl_client.half import OnnxHalf
from hosfl_client.known_gradient import known_gradient
from hosfl_lightning.device.command import main as export
from hosfl_lightning.files import write_json, write_whole
from hosfl_lightning.recipe import HOSFLCommand, command
from hosfl_lightning.run.identity import hardware, starts

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
#: Of the recipe's controls.
PUBLISHED, FIRST_ORDER = "HO-SFL as published", "first_order"
PROBES = 8
#: Kinds of clients, and what runs their half.
KINDS, ENGINES = ("side", "lora"), ("torch", "fp32", "int8", "int4")
CONTROLS = ("frozen", FIRST_ORDER)
ROWS = [*CONTROLS, *(f"{kind}/{engine}" for kind in KINDS for engine in ENGINES)]
QUICK = ["frozen", "side/torch", "side/int4"]
SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class Row:
    """A client: what it trains and how, and what runs its half."""

    kind: str
    engine: str = "torch"

    @classmethod
    def of(cls, name: str) -> Row:
        """From the name in `ROWS`."""
        return cls(*name.split("/"))

    def recipe(self, seed: int, quick: bool, folder: Path) -> dict[str, Any]:
        """The quickstart with this client; its runs go into ``folder``."""
        found = yaml.safe_load(RECIPE.read_text())
        trainer, model, data = found["trainer"], found["model"]["init_args"], found["data"]["init_args"]
        controls = {one["name"]: one for one in trainer.pop("controls") if isinstance(one, dict)}
        if self.kind == "frozen":
            trainer["algorithm"] = {"class_path": "hosfl_lightning.algorithms.Frozen"}
        elif self.kind != "side":
            control = deepcopy(controls[FIRST_ORDER if self.kind == FIRST_ORDER else PUBLISHED])
            trainer["algorithm"], model["lora"]["client"] = control["algorithm"], control["lora"]
            model["side"]["client"] = 0
        if self.kind == "lora":
            trainer["algorithm"]["init_args"]["probes"] = PROBES
        if quick:
            trainer["max_rounds"] = 2
            data |= {"packages": ["jsonargparse", "peft"], "batch_size": 1, "validation_bytes_per_client": 600,
                     "test_bytes_per_client": 600, "max_bytes_per_client": 2000}  # fmt: skip
        trainer |= {
            "seed": seed, "val_check_interval": trainer["max_rounds"], "default_root_dir": str(folder),
            "enable_progress_bar": False, "enable_checkpointing": False, "replay_log": False,
        }  # fmt: skip
        model["seed"] = data["seed"] = seed
        return found


def fit(recipe: Path, half: Path | None) -> HOSFLCommand:
    """``hosfl fit``, with devices in the place of its clients where there is an exported half."""

    class Fit(HOSFLCommand):
        def before_fit(self) -> None:
            self.started = starts(self.model.trained_state())
            if half is not None:
                trainer: Any = self.trainer
                trainer.serving = Devices(half, trainer)

    return command(["fit", f"--config={recipe}"], Fit)


def run(row: Row, seed: int, quick: bool, half: Path | None, folder: Path) -> dict[str, Any]:
    """One run: validation loss in nats a byte, before and after, by the server's fp32 replica of the client half.

    ``on_devices`` are the same with z from the half that the clients have; None of PyTorch's clients.
    """
    began = time.process_time()
    done: Any = fit(written(row.recipe(seed, quick, folder), folder / "recipe.yaml"), half)
    trainer = done.trainer
    if half is not None:
        fleet: DeviceFleet = trainer.fleet
        fleet.check_same()
    return {
        "row": f"{row.kind}/{row.engine}" if row.kind in KINDS else row.kind, "seed": seed,
        "rounds": trainer.global_step,
        "before": trainer.summary["val_loss_first"], "after": trainer.summary["val_loss_last"],
        "on_devices": on_devices(Path(trainer.log_dir) / "metrics.csv") if half is not None else None,
        "server_start": done.started["server_half"]["weights"], "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


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
    """Exported halves, made when they are asked for; every seed has the same frozen weights.

    Args:
        folder: For their files.
        quick: As of the runs.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick

    def __call__(self, row: Row) -> Path | None:
        """``phone.onnx`` of a row; None: its clients are PyTorch's."""
        if row.engine == "torch":
            return None
        path = self.folder / row.kind / row.engine / "phone.onnx"
        if not path.is_file():
            recipe = written(row.recipe(0, self.quick, self.folder), path.parent / "recipe.yaml")
            quantize = "none" if row.engine == "fp32" else row.engine
            export([f"--config={recipe}", f"--out={path}", f"--quantize={quantize}"])
        return path

    def figures(self, row: Row) -> dict[str, Any]:
        """Bytes of the graph, and how far what a client sends is what it would send in fp32.

        ``probes``: correlation with the exact derivative, over directions; ``cosine``: of the side adapter's gradient
        with that of the half in fp32, at the start and for a Gaussian λ.
        """
        path = self(row)
        assert path is not None
        half = OnnxHalf(path, threads=1)
        found = {"bytes": path.stat().st_size, "probes": half.manifest.figures["probes"], "cosine": None}
        if row.kind == "side":
            reference = self(Row(row.kind, "fp32"))
            assert reference is not None
            own, other = (gradient(one, reference) for one in (path, reference))
            found["cosine"] = float(own @ other / np.sqrt((own @ own) * (other @ other)))
        return found


def gradient(half: Path, recorded: Path) -> np.ndarray[Any, Any]:
    """The side adapter's gradient, on the batch and λ that were recorded beside another half; fp64."""
    engine, held = OnnxHalf(half, threads=1), load_file(recorded.with_suffix(".check.safetensors"))
    multiplier, mask = held["multiplier"], held["attention_mask"].astype(bool)
    coded = Coded("fp32", "float32", multiplier.shape[1], multiplier)
    found = known_gradient(engine, engine.manifest, {"input_ids": held["input_ids"], "attention_mask": mask}, coded, mask)
    return np.concatenate([one.reshape(-1) for one in found]).astype(np.float64)


def load(path: Path) -> dict[str, Any]:
    """What was found before; nothing, where there is no file."""
    if not path.is_file():
        return {"halves": {}, "runs": []}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(found: dict[str, Any], out: Path, command: str) -> None:
    """``device_quality.json`` and ``table.md``."""
    found |= {
        "command": command, "date": datetime.date.today().isoformat(), "machine": hardware(torch.device("cpu")),
    }  # fmt: skip
    write_json(out / "device_quality.json", found, indent=1)
    write_whole(out / "table.md", lambda file: file.write(page(found).encode()))


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2; --quick: 0")
    parser.add_argument("--quick", action="store_true", help="two rounds of three rows, in seconds")
    own = parser.parse_args(args)
    own.rows = own.rows or (QUICK if own.quick else ROWS)
    own.seeds = own.seeds or (SEEDS[:1] if own.quick else SEEDS)
    own.out = own.out / "quick" if own.quick else own.out
    return own


@contextmanager
def elsewhere() -> Iterator[Path]:
    """A folder for what is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(args: Sequence[str] | None = None) -> None:
    """Run seed after seed, so that the table has whole seeds; it grows with each run."""
    own = arguments(args)
    own.out.mkdir(parents=True, exist_ok=True)
    found = load(own.out / "device_quality.json")
    words = "python -m benchmarks.device_quality --out OUT" + (" --quick" if own.quick else "")
    with elsewhere() as folder:
        halves = Halves(folder / "halves", own.quick)
        for seed in own.seeds:
            for name in own.rows:
                row = Row.of(name)
                if any((one["row"], one["seed"]) == (name, seed) for one in found["runs"]):
                    continue
                half = halves(row)
                if half is not None and name not in found["halves"]:
                    found["halves"][name] = halves.figures(row)
                ended = run(row, seed, own.quick, half, folder / f"{name.replace('/', '_')}_{seed}")
                found["runs"].append(ended)
                print(json.dumps(ended), flush=True)
                write(found, own.out, words)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    main()
