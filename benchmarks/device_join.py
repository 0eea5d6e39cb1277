"""From a client's command to its place in a run, and what it holds then: with a server that waits for more clients."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.device_script import PAUSE

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples/device/lora.yaml"
TEXT = ROOT / "docs/remote.md"
HOSFL = [sys.executable, "-c", "from hosfl_lightning.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
#: The client without torch is the installed one.
INSTALLED = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}


def joined(folder: Path, python: str, half: Path, repeats: int, torch_repeats: int) -> dict[str, Any]:
    """Medians: seconds, of the clock and of the processor, and resident bytes of the idle client.

    Args:
        folder: For what is made.
        python: Of the client's environment.
        half: Of ``RECIPE``.
        repeats: Of the client.
        torch_repeats: Of the one in PyTorch.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    recipe = _client_recipe(folder)
    join = ["join", "--server", address, "--insecure", "--name"]
    server = _start([
        *HOSFL, "serve", "--config", RECIPE, "--clients", ROOT / "examples/device/clients.yaml", "--insecure",
        "--listen", address, "--run", folder / "run", "--trainer.max_rounds", 1, "--quorum", 3,
    ], folder / "server.log")  # fmt: skip
    try:
        _wait(server, folder / "server.log", "clients are there", 120)
        own = [
            python, "-m", "hosfl_client.cli", *join, "phone-a", "--half", half, "--data", TEXT, "--threads", 1,
            "--state", folder / "phone-a",
        ]  # fmt: skip
        torch = [*HOSFL, *join, "lab", "--config", recipe, "--state", folder / "lab"]
        return {
            "client": _median([_once(own, folder / f"phone_{i}.log", 2 * PAUSE) for i in range(repeats + 1)][1:]),
            "torch": _median([_once(torch, folder / f"lab_{i}.log", 0.5) for i in range(torch_repeats + 1)][1:]),
        }
    finally:
        server.kill()
        server.wait()


def _once(command: list[object], log: Path, pause: float) -> dict[str, float]:
    begin = time.monotonic()
    client = _start(command, log)
    try:
        _wait(client, log, "of the run", 120)
        seconds, processor = time.monotonic() - begin, _processor(client.pid)
        time.sleep(pause)
        told = dict(re.findall(r"(VmRSS|VmHWM|RssAnon):\s+(\d+)", Path(f"/proc/{client.pid}/status").read_text()))
        return {"seconds": seconds, "processor": processor, **{name: int(value) << 10 for name, value in told.items()}}
    finally:
        client.kill()
        client.wait()


def _median(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(one[name] for one in found) for name in found[0]}


def _processor(pid: int) -> float:
    """Seconds, its children's that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _start(command: list[object], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        own = ENVIRONMENT if command[: len(HOSFL)] == HOSFL else INSTALLED
        return subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=own, cwd=ROOT)


def _wait(process: subprocess.Popen[bytes], log: Path, words: str, seconds: float) -> None:
    """Until it has said so."""
    end = time.monotonic() + seconds
    while words not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{log.name} never said {words!r}:\n{log.read_text(errors='replace')}")
        time.sleep(0.01)


def _client_recipe(folder: Path) -> Path:
    """The model of the run, and a text of one's own."""
    told = yaml.safe_load(RECIPE.read_text())
    told = {"model": told["model"], "data": told["data"]}
    told["model"]["init_args"].pop("optimizer")
    told["data"]["init_args"] |= {"files": [str(TEXT)], "validation_files": [str(TEXT)]}
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(told))
    return path
