"""How fast a client that was away replays what it missed: rounds a second, beside a live client's part of a round.

    python benchmarks/replay.py

The client half of benchmarks/client_step.py, an update log on disk of 64 rounds that eight clients answered, read,
checked, decoded and applied as ``hosfl replay`` does. Bytes are those of a round's entry in the log.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from client_step import client, minibatch, seconds, step

from hosfl_lightning.aggregation import apply_update, combine
from hosfl_lightning.optim import SGD, AdamW, ZerothOrder
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import ProjectedGradients, decode, encode

CLIENTS = 8
RULES = (SGD(lr=1e-4), AdamW(lr=1e-4))


def record(optimizer: ZerothOrder, path: Path, rounds: int) -> ReplayLog:
    """A log of updates that leave θ finite."""
    log = ReplayLog.open(path, {"incarnation": "0"})
    generator = torch.Generator().manual_seed(0)
    for round in range(rounds):
        basis = optimizer.basis(round)
        values = torch.randn(CLIENTS, basis.size, generator=generator)
        answers = [ProjectedGradients(round, k, basis.describe(), v, 1000 + k) for k, v in enumerate(values)]
        update = replace(combine(answers, optimizer, mu=optimizer.mu), incarnation="0-0123456789ab")
        log.append(round, encode(update))
        for group in optimizer.param_groups:
            group["step"] += 1
    return log


def replay(optimizer: ZerothOrder, path: Path) -> None:
    """All rounds of the log, from the start."""
    for group in optimizer.param_groups:
        group["step"] = 0
    for frame in ReplayLog.read(path).frames():
        apply_update(decode(frame, "update"), optimizer)  # type: ignore[arg-type]


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a call, the first one aside."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch, cohort = minibatch()
    print(hardware(torch.device("cpu")))
    print(f"{'client':6} {'d_c':>9} {'rule':6} {'P':>3} {'bytes a round':>14} {'rounds / s':>11} {'live / s':>9}")
    for full in (False, True):
        for rule in RULES:
            for probes in (4, 16):
                who = client(full, rule, probes)
                elements = sum(p.numel() for p in who.optimizer.parameters)
                with tempfile.TemporaryDirectory() as folder:
                    log = record(who.optimizer, Path(folder) / "updates.log", arguments.rounds)
                    size = log.path.stat().st_size / arguments.rounds
                    replayed = arguments.rounds / median(partial(replay, who.optimizer, log.path), arguments.repeats)
                live = 1 / median(partial(step, who, batch, cohort.rows, 0), arguments.repeats)
                print(
                    f"{'full' if full else 'LoRA':6} {elements:9,} {type(rule).__name__:6} {probes:3} {size:14.0f} "
                    f"{replayed:11.1f} {live:9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
