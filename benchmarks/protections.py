"""What keeps data from the server, what it costs in learning, and what attacks still find: one table to choose from.

    python -m benchmarks.protections --data DATA --minilm MODEL --out docs/results/protections

DATA holds ``stories260k``, ``tinyshakespeare``, ``mr_polarity``; MODEL is all-MiniLM-L6-v2. Three tasks (norms on
digits by eight probes, a side adapter on Shakespeare and on film reviews), each with a frozen and a first-order client
beside it and with the client as it is; then one protection after the other, at learning rates chosen without any.
After each run `hosfl attack` tries the messages of its first round. What is finished is not run again:
``protections.json`` holds every run. ``--quick`` is two rounds of four rows: it shows the table, not the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.protection_page import page
from benchmarks.protection_rows import ALL, EVERY, QUICK, Row
from benchmarks.rows import load, write
from hosfl_lightning.attack.command import AttackCommand, Attacker
from hosfl_lightning.recipe import command
from hosfl_lightning.split import run as split_run

SEEDS = [0, 1, 2]
#: That each attack takes.
EXAMPLES = 4


def run(row: Row, seed: int, quick: bool, folder: Path, places: dict[str, str]) -> dict[str, Any]:
    """One run and the attacks on it."""
    began, path = time.process_time(), folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(row.recipe(seed, quick, folder, places)))
    trainer: Any = command(["fit", f"--config={path}"]).trainer
    out = folder / "attack"
    attacks = f"--attacks=[{','.join(ALL[row.task].attacks)}]"
    command(["attack", f"--config={path}", f"--run={trainer.log_dir}", attacks, f"--out={out}",
             f"--examples={EXAMPLES}"], AttackCommand, Attacker)  # fmt: skip
    told, summary = json.loads((out / "attack.json").read_text()), trainer.summary
    crossed = (summary["bytes_up"] + summary["bytes_down"]) / (trainer.global_step * trainer.datamodule.num_clients)
    return {
        "row": row.name, "seed": seed, "rounds": trainer.global_step, "before": summary["val_loss_first"],
        "after": summary["val_loss_last"], "as_sent": as_sent(trainer) if row.noises_z else None,
        "privacy": summary.get("privacy"), "bytes": round(crossed),
        "scores": told["scores"], "left_out": told["left_out"], "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


@torch.no_grad()
def as_sent(trainer: Any) -> float:
    """Validation loss on z as the clients send it, clipped and noised; ``after`` is on z as it is."""
    model, endpoint, total, terms = trainer.lightning_module, trainer.endpoint, 0.0, 0
    for number, batch in enumerate(trainer.datamodule.val_dataloader()):
        batch = model.prepare(batch)
        mask = batch["attention_mask"]
        z = endpoint.noised(split_run(model.client_half, batch), mask.bool(), "smashed_data", ("held out", number))
        count = model.count(batch["labels"])
        total += count * float(model.loss(model.above(z, mask), batch["labels"]))
        terms += count
    return total / terms


def arguments(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2, for mr_polarity")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--tasks", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2; --quick: 0")
    parser.add_argument("--quick", action="store_true", help="two rounds of four rows, in seconds")
    own = parser.parse_args(args)
    if own.minilm is None and not own.quick and "mr_polarity" in own.tasks:
        parser.error("--minilm: mr_polarity needs it; give the model's folder, or leave the task out by --tasks")
    own.rows = QUICK if own.quick else [row for row in EVERY if row.task in own.tasks]
    own.seeds = own.seeds or (SEEDS[:1] if own.quick else SEEDS)
    own.out = own.out / "quick" if own.quick else own.out
    return own


def main(args: Sequence[str] | None = None) -> None:
    """Seed after seed; the table grows with each run."""
    own = arguments(args)
    own.out.mkdir(parents=True, exist_ok=True)
    path = own.out / "protections.json"
    found = load(path)
    words = "python -m benchmarks.protections --data DATA --minilm MODEL --out OUT" + (" --quick" if own.quick else "")
    done = {(one["row"], one["seed"]) for one in found["runs"]}
    places = {"data": str(own.data.resolve()), "minilm": str(own.minilm and own.minilm.resolve())}
    with tempfile.TemporaryDirectory() as name:
        for seed, row in ((seed, row) for seed in own.seeds for row in own.rows if (row.name, seed) not in done):
            print(f"{row.name}, seed {seed}", flush=True)
            folder = Path(name) / str(seed) / str(own.rows.index(row))
            found["runs"].append(run(row, seed, own.quick, folder, places))
            write(found, path, words, [row.name for row in EVERY], page)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    main()
