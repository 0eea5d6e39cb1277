"""Time and memory of an exported half in ONNX Runtime, without PyTorch.

    python -m benchmarks.exported_engine phone.onnx [--batch 8] [--length 128] [--threads 1]

prints, for each way in which the session keeps memory, the CPU time of a forward and what is resident. Linux.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hosfl_client import half as engine

WAYS = {"kept": "kept, then given back by release", "none": "no arena"}


def main() -> None:
    """Each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        print(row(given))
        return
    size = sum((given.half.parent / name).stat().st_size for name in names(given.half)) / 2**20
    print(f"{given.half}: {size:.1f} MiB, {given.batch} x {given.length}, {given.threads} thread(s)")
    print(
        "| memory of forwards | CPU ms a forward | MiB loaded | peak | after | given back |\n|---|---|---|---|---|---|"
    )
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.exported_engine", *sys.argv[1:], "--way", way]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


def row(given: Any) -> str:
    """Of one way."""
    if given.way == "none":
        options = engine.ort.SessionOptions

        def without_arena() -> Any:
            made = options()
            made.enable_cpu_mem_arena = False
            return made

        engine.ort.SessionOptions = without_arena
    half = engine.OnnxHalf(given.half, given.threads)
    loaded = resident("VmRSS")
    generator = np.random.default_rng(0)
    ids = generator.integers(0, half.manifest.vocabulary or 1, (given.batch, given.length))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    half.forward(batch)
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 5 and len(times) < 100):
        start = time.process_time()
        half.forward(batch)
        times.append(time.process_time() - start)
    after, back = resident("VmRSS"), "-"
    if given.way == "kept":
        half.release()
        back = f"{resident('VmRSS'):.0f}"
    peak = resident("VmHWM")
    return f"| {WAYS[given.way]} | {1e3 * np.median(times):.1f} | {loaded:.0f} | {peak:.0f} | {after:.0f} | {back} |"


def names(path: Path) -> list[str]:
    """Files of the graph."""
    return [name for name in engine.Manifest.load(path).files if name.startswith(f"{path.name}")]


def resident(field: str) -> float:
    """MiB of this process, ``VmRSS`` now or ``VmHWM`` at most."""
    [found] = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found) / 1024


if __name__ == "__main__":
    main()
