"""How long a command waits for its imports, and the quickstart for its first round, beside ``import torch`` alone.

    python -m benchmarks.start

CPU seconds (user and system) of a child process, and seconds until it says something, medians of ``--repeats`` times in
turn, on one thread. The quickstart runs on a terminal, once with nothing in its cache and once with its data there, and
is ended when it says that a round is done.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

HOSFL = [sys.executable, "-m", "hosfl_lightning.cli"]
RECIPE = str(Path(__file__).parent.parent / "recipes" / "quickstart.yaml")
TORCH = "import torch"
ROUND = re.compile(rb"\b1/40\b")
COMMANDS = {
    TORCH: [sys.executable, "-c", "import torch"],
    "hosfl --help": [*HOSFL, "--help"],
    "a mistyped command": [*HOSFL, "fti", "--config", RECIPE],
    "a mistyped file": [*HOSFL, "fit", "--config", "recipes/quikstart.yaml"],
    "a mistyped option": [*HOSFL, "fit", "--trainer.max_round", "3", "--config", RECIPE],
    "import hosfl_lightning": [sys.executable, "-c", "import hosfl_lightning"],
    "from hosfl_lightning import HOSFL": [sys.executable, "-c", "from hosfl_lightning import HOSFL"],
}
FIRST, NEXT = "quickstart to round 1, nothing cached", "quickstart to round 1"


@dataclass(frozen=True)
class Cost:
    """Of a process: CPU seconds until it was over, and seconds until its first word."""

    cpu: float
    word: float


def measured(command: list[str], until: re.Pattern[bytes] | None = None, **given: str) -> Cost:
    """A child on a terminal of its own, to its end or until it says something."""
    began, (child, terminal) = time.perf_counter(), pty.fork()
    if child == 0:
        os.execve(command[0], command, {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **given})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # or a bar has no room for figures
    said, word = b"", float("nan")
    while more := _read(terminal):
        word = word if said else time.perf_counter() - began
        said += more
        if until is not None and until.search(said):
            os.kill(child, signal.SIGKILL)
    used = os.wait4(child, 0)[2]
    os.close(terminal)
    if until is not None and not until.search(said):
        raise RuntimeError(f"{' '.join(command)} did not get there:\n{said.decode(errors='replace')}")
    return Cost(used.ru_utime + used.ru_stime, word)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux's word for the end
        return b""


def quickstart(folder: str, cache: str) -> Cost:
    """As in the README, until its first round is done."""
    return measured([*HOSFL, "fit", "--config", RECIPE, f"--trainer.default_root_dir={folder}/runs"], ROUND,
                    HOSFL_CACHE=cache)  # fmt: skip


def costs(repeats: int, names: list[str]) -> dict[str, Cost]:
    """Medians of each, measured in turn."""
    with tempfile.TemporaryDirectory() as folder:
        doing: dict[str, Callable[[], Cost]] = {name: partial(measured, argv) for name, argv in COMMANDS.items()}
        doing[FIRST] = partial(quickstart, folder, "")
        doing[NEXT] = partial(quickstart, folder, f"{folder}/cache")
        doing = {name: doing[name] for name in names or doing}
        for do in doing.values():  # what is on no disk's cache, and in ours, is so for all
            do()
        rows = [{name: do() for name, do in doing.items()} for _ in range(repeats)]
    return {name: Cost(median(row[name].cpu for row in rows), median(row[name].word for row in rows)) for name in doing}


def quick() -> dict[str, float]:
    """CPU seconds over those of ``import torch``, and seconds to the first word."""
    found = costs(3, [TORCH, "hosfl --help", "a mistyped option", NEXT])
    alone = found.pop(TORCH).cpu
    ratios = {f"{name}, CPU / import torch": cost.cpu / alone for name, cost in found.items()}
    return {**ratios, "quickstart, seconds to the first word": found[NEXT].word}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    found = costs(parser.parse_args().repeats, [])
    alone = found[TORCH].cpu
    print("| what | CPU s | over `import torch` | of it | first word, s |\n|---|---|---|---|---|")
    for name, cost in found.items():
        print(f"| {name} | {cost.cpu:.2f} | {cost.cpu - alone:+.2f} | {cost.cpu / alone:.2f} | {cost.word:.2f} |")


if __name__ == "__main__":
    main()
