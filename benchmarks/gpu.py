"""What this package costs on a GPU: one command, ten minutes at most, for a card of any size.

    python -m benchmarks.gpu --out gpu.json

Random OPT-125M- and OPT-1.3B-shaped models, cut at a third, bf16 and fp32:

==========  ==========================================================================================
directions  signs and Gaussian directions against the bits of the CPU's
step        a forward-only client's step over P + 1 plain forwards, LoRA and full; its peak over one forward's
mezo        a batch of ``ZerothOrderTraining`` in a Trainer over MeZO's step on that batch; peaks
batch       the step with probes in a batch over the step with probes one by one
compiled    a plain forward and a step, eager over compiled
==========  ==========================================================================================

Time is between CUDA events, the median of pairs that take turns, without a wait in between; peaks are the allocator's,
with what is held. A part that is out of its seconds leaves the rest out and says so; a case that fails is named, and
the next one runs. The file is written after every case. ``--device cpu --tiny`` runs all of it in a minute.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.client_step import forwards, step
from benchmarks.gpu_bench import PROBES, REAL, TINY, Bench
from benchmarks.mezo import LR, MU, QUIET, Language, MeZO
from hosfl_lightning.callbacks import ZerothOrderTraining
from hosfl_lightning.files import write_json
from hosfl_lightning.memory import storage_bytes
from hosfl_lightning.optim import SGD
from hosfl_lightning.rng import DISTRIBUTIONS, Stream, direction
from hosfl_lightning.run.identity import hardware
from hosfl_lightning.split import compiled as halves
from hosfl_lightning.split import run

#: Seconds of each part at most, in the order they run.
BOUNDS = {"directions": 40.0, "step": 150.0, "mezo": 150.0, "batch": 80.0, "compiled": 150.0}


Row = dict[str, Any]
#: What is measured, by its name in the table.
Cases = Iterator[tuple[str, Callable[[], Row]]]


def directions(bench: Bench) -> Cases:
    """Equal bits, or not."""

    def equal(stream: Stream, numel: int) -> Row:
        ours, its = direction(stream, 3, 5, 5 + numel), direction(stream, 3, 5, 5 + numel, device=bench.device)
        return {"equal": torch.equal(ours.view(torch.int32), its.cpu().view(torch.int32))}

    for (name, domain), numel in product(DISTRIBUTIONS.items(), bench.size.numels):
        yield f"{name}, {numel:,} elements", partial(equal, Stream(7, domain), numel)


def client_step(bench: Bench) -> Cases:
    """Time over P + 1 forwards, and peak over one's."""

    def measured(name: str, dtype: torch.dtype, full: bool) -> Row:
        who, shape = bench.client(bench.half(name, dtype, full)), bench.size.batches[0]
        batch, rows = bench.batch(shape, name), [slice(0, shape[0])]
        ratio, plain = bench.ratio(lambda: step(who, batch, rows, 1), lambda: forwards(who, batch, rows, PROBES + 1))
        with bench.peak() as forward:
            who.forward(batch, rows)
        with bench.peak() as ours:
            step(who, batch, rows, 1)
        held = storage_bytes([*who.half.parameters(), *who.half.buffers()])
        return {
            "forward, ms": 1e3 * plain / (PROBES + 1), "time / (P+1) forwards": ratio,
            "forward's peak, MiB": (held + forward[0]) / 2**20, "peak / it": (held + ours[0]) / (held + forward[0]),
        }  # fmt: skip

    for words, name, _, dtype, full in bench.grid(False, True):
        yield words, partial(measured, name, dtype, full)


class Turns(Callback):
    """After each batch of the Trainer MeZO's step on it. Peaks are the third batch's, those before warm up."""

    METERED = 2

    def __init__(self, bench: Bench, other: MeZO) -> None:
        self.bench, self.other = bench, other
        self.marks: list[tuple[Any, Any, Any]] = []
        self.peaks: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, _: Any, __: Any, index: int) -> None:
        self.meter = self.bench.peak()
        if index == self.METERED:
            self.peaks = self.meter.__enter__()
        self.began = self.bench.stamp()

    def on_train_batch_end(self, trainer: L.Trainer, _: Any, __: Any, batch: Tensor, index: int) -> None:
        middle = self.bench.stamp()
        if index == self.METERED:
            self.meter.__exit__(None, None, None)
            with self.bench.peak() as theirs:
                self.other.step(batch)
            self.peaks += theirs
        else:
            self.other.step(batch)
            self.marks.append((self.began, middle, self.bench.stamp()))


def mezo(bench: Bench) -> Cases:
    """A batch of the Trainer over MeZO's step."""

    def measured(name: str, words: str, dtype: torch.dtype, full: bool, estimator: str) -> Row:
        ours, other = bench.model(name, dtype, full), MeZO(bench.model(name, dtype, full), 1)
        if not bench.cuda:  # MemoryMeter does not see into inference mode
            other.without_grad = torch.no_grad
        turns = Turns(bench, other)
        ids = bench.batch(bench.size.batches[0], name)["input_ids"]
        same: Any = [ids] * (bench.size.pairs + Turns.METERED + 1)
        quiet = {**QUIET, "accelerator": "gpu" if bench.cuda else "cpu"}
        if bench.cuda:
            quiet["devices"] = [bench.device.index]
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        L.Trainer(
            **quiet, precision="bf16-true" if words == "bf16" else "32-true",
            callbacks=[ZerothOrderTraining(SGD(lr=LR), probes=1, mu=MU, estimator=estimator), turns],
        ).fit(Language(ours), DataLoader(same, batch_size=None))  # fmt: skip
        ratio, theirs = bench.median(turns.marks[Turns.METERED :])
        held = storage_bytes(ours.parameters())
        return {"MeZO's step, ms": 1e3 * theirs, "batch / it": ratio, "its peak, MiB": (held + turns.peaks[1]) / 2**20,
                "peak / it": (held + turns.peaks[0]) / (held + turns.peaks[1])}  # fmt: skip

    for (words, name, short, dtype, full), estimator in product(bench.grid(True, False), ("central", "forward")):
        yield f"{words}, {estimator}", partial(measured, name, short, dtype, full, estimator)


def batch(bench: Bench) -> Cases:
    """Probes at once over one by one."""

    def measured(name: str, dtype: torch.dtype, shape: tuple[int, int], probe_batch: Any) -> Row:
        half = bench.half(name, dtype, full=False)
        together, alone = bench.client(half, probe_batch), bench.client(bench.half(name, dtype, full=False))
        data, rows = bench.batch(shape, name), [slice(0, shape[0])]
        both = bench.ratio(lambda: step(together, data, rows, 1), lambda: step(alone, data, rows, 1))
        plain = bench.ratio(lambda: step(together, data, rows, 1), lambda: forwards(alone, data, rows, PROBES + 1))
        with bench.peak() as forward:
            alone.forward(data, rows)
        with bench.peak() as ours:
            step(together, data, rows, 1)
        held = storage_bytes([*half.parameters(), *half.buffers()])
        return {"one by one, ms": 1e3 * both[1], "batch / it": both[0], "batch / (P+1) forwards": plain[0],
                "peak / a forward's": (held + ours[0]) / (held + forward[0])}  # fmt: skip

    for shape, size in product(bench.size.batches[::-1], ("auto", PROBES)):
        for words, name, _, dtype, _ in bench.grid(False):
            yield (f"{words}, {'x'.join(map(str, shape))}, probe_batch: {size}",
                   partial(measured, name, dtype, shape, size))  # fmt: skip


def compiled(bench: Bench) -> Cases:
    """Eager over compiled."""

    def measured(name: str, dtype: torch.dtype, full: bool) -> Row:
        eager, fast = (bench.half(name, dtype, full) for _ in range(2))
        halves.compile_half(fast, "the client's half")
        shape, before = bench.size.batches[0], halves.compile_seconds()
        data, rows, who, other = bench.batch(shape, name), [slice(0, shape[0])], bench.client(eager), bench.client(fast)
        with torch.no_grad():
            one = bench.ratio(lambda: run(eager, data), lambda: run(fast, data))
        whole = bench.ratio(lambda: step(who, data, rows, 1), lambda: step(other, data, rows, 1))
        return {"eager / compiled forward": one[0], "eager / compiled step": whole[0], "step, ms": 1e3 * whole[1],
                "compiling, s": halves.compile_seconds() - before}  # fmt: skip

    for words, name, _, dtype, full in bench.grid(False, True):
        yield words, partial(measured, name, dtype, full)


PARTS = {"directions": directions, "step": client_step, "mezo": mezo, "batch": batch, "compiled": compiled}


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Ends what takes longer.

    Raises:
        TimeoutError: It did.
    """

    def end(*_: Any) -> None:
        raise TimeoutError("out of time")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def said(row: Row) -> list[str]:
    """Cells of a table."""
    return [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]


def measure(cases: Cases, seconds: float) -> dict[str, Any]:
    """Rows, what failed and why, and what was left out; each told as it comes."""
    found: dict[str, Any] = {"rows": {}, "failed": {}, "left_out": []}
    until = time.monotonic() + seconds
    for name, work in cases:
        left = until - time.monotonic()
        if left <= 0:
            found["left_out"].append(name)
            continue
        try:
            with bounded(left):
                row = found["rows"][name] = work()
        except TimeoutError:
            found["left_out"].append(name)
            continue
        except Exception as error:
            found["failed"][name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"failed: {name}: {found['failed'][name]}", flush=True)
            continue
        finally:
            if torch.cuda.is_initialized():
                gc.collect()
                torch.cuda.empty_cache()
        if len(found["rows"]) == 1:
            print(f"| | {' | '.join(row)} |\n|---|{'---|' * len(row)}")
        print(f"| {name} | {' | '.join(said(row))} |", flush=True)
    if found["left_out"]:
        print(f"out of time, left out: {'; '.join(found['left_out'])}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and write the file; status 1 when something failed or directions differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args(arguments)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny shows that the script runs")
    bench, machine = Bench(given.device, TINY if given.tiny else REAL), hardware(given.device)
    found: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine, "parts": {}}
    print(machine)
    for part in given.parts:
        print(f"\n## {part}\n", flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found["parts"][part] = measure(PARTS[part](bench), BOUNDS[part])
        write_json(given.out, found, indent=1)
    failed = any(one["failed"] for one in found["parts"].values())
    rows = found["parts"].get("directions", {"rows": {}})["rows"]
    return int(failed or not all(row["equal"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
