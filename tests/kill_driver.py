"""A run that is killed with SIGKILL again and again, and resumed.

::

    python -m tests.kill_driver ROOT KILLS SEED

The parent imports once and forks a process for every life of a run. It never trains: autograd does not survive a fork.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from tests.small_run import SmallRun, contents

#: What the living process is doing, for the parent to read.
DOING = mmap.mmap(-1, 32)


def main(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """How many kills and runs there were, where the kills fell, and what of a resumed run was other than it must be."""
    torch.set_num_threads(1)
    run, rng = SmallRun(root), random.Random(seed)
    run.model()  # imports what every life needs
    pid = live(run)
    wait_for(pid, training)
    began = time.monotonic()
    assert end_of(pid) == 0
    seconds = time.monotonic() - began
    expected, size = contents(run.folder), log_size(run)
    report: dict[str, Any] = {"kills": 0, "runs": 0, "phases": Counter(), "mismatches": []}
    while report["kills"] < kills:
        shutil.rmtree(run.folder)
        left = min(rng.randint(1, 5), kills - report["kills"])
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            before = parts(run.folder)
            code = life(run, size, seconds, rng) if left else end_of(live(run))
            if code == -signal.SIGKILL:
                left -= 1
                report["kills"] += 1
                report["phases"][phase(parts(run.folder) - before)] += 1
        found = contents(run.folder)
        report["runs"] += 1
        report["mismatches"] += [n for n in {*expected, *found} if found.get(n) != expected.get(n)] + [code] * bool(
            code
        )
    return report


def live(run: SmallRun) -> int:
    """A process that begins the run, or goes on with it where it has begun."""
    note("setting up")
    if pid := os.fork():
        return pid
    code = 1
    try:
        begun = (run.folder / "run.json").exists()
        if not begun:
            shutil.rmtree(run.folder, ignore_errors=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        run.fit(Notes(), ckpt_path=run.folder if begun else None)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def life(run: SmallRun, size: int, seconds: float, rng: random.Random) -> int:
    """Kill a process in its setup, at a moment of its training, or where its log has a length; its exit code."""
    pid, reached, draw = live(run), log_size(run), rng.random()
    if 0.1 < draw < 0.6:
        wait_for(pid, training)
    elif draw >= 0.6:
        wanted = rng.randint(min(reached + 1, size), size)
        wait_for(pid, lambda: log_size(run) >= wanted)
    time.sleep(rng.uniform(0, seconds if draw < 0.6 else seconds / 10))
    os.kill(pid, signal.SIGKILL)
    return end_of(pid)


def wait_for(pid: int, condition: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    while not condition() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def training() -> bool:
    return phase(set()) != "setting up"


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def log_size(run: SmallRun) -> int:
    log = run.folder / "updates.log"
    return log.stat().st_size if log.exists() else 0


def parts(folder: Path) -> set[tuple[str, int]]:
    """The temporary files that are there, and since when."""
    return {(path.name, path.stat().st_mtime_ns) for path in folder.rglob("*.part")}


def phase(new: set[tuple[str, int]]) -> str:
    """What the process was doing."""
    written = [name.removeprefix(".").removesuffix(".part") for name, _ in new]
    return f"writing {written[0]}" if written else DOING[:].rstrip(b"\0").decode()


def note(doing: str) -> None:
    DOING[:] = doing.encode().ljust(len(DOING), b"\0")


class Notes(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        note("measuring memory")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        note("validating")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        note("writing what a validation left")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        note("in a round")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        note("between record and row")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        note("exporting and summing up")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
