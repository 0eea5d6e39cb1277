"""A server and a client in PyTorch, two devices without it, in one run on this machine; then the same by probes.

    python examples/device/run.py            # from the root of a clone in which hosfl_lightning is installed

It makes an environment for the devices (``pip install ./client``), exports their half, and lets the three clients take
part. At the end θ_c is the same at all three, to the bit, and a table says what each process held in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = Path("runs/device")
#: The texts of the clients, files of this clone.
TEXTS = {"lab": "docs/own_data.md", "phone-a": "docs/remote.md", "phone-b": "docs/extend.md"}
MIB = 1 << 20


@dataclass
class Process:
    """One of the four, and what it held.

    Attributes:
        joined: When it said so.
        idle: Resident bytes half a second later.
        peak: Most resident bytes.
    """

    name: str
    running: subprocess.Popen[bytes]
    log: Path
    idle: int = 0
    peak: int = 0
    joined: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def settled(self) -> bool:
        """Whether it has joined, and has had half a second since."""
        return 0 < self.joined < time.monotonic() - 0.5

    def look(self) -> None:
        """Whether it has joined, and at its memory, where the system tells (Linux)."""
        if not self.joined and "of the run" in self.said:
            self.joined = time.monotonic()
        try:
            status = Path(f"/proc/{self.running.pid}/status").read_text()
        except OSError:
            return
        held = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM")))
        if held:
            resident, self.peak = (int(held[key].split()[0]) << 10 for key in ("VmRSS", "VmHWM"))
            if self.settled and not self.idle:
                self.idle = resident


def main() -> None:
    """Both runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each of the two runs (default 20)")
    parser.add_argument("--python", help="of an environment that has hosfl-client; default: one is made")
    parser.add_argument("--only", choices=["side", "lora"], help="one of the two runs")
    given = parser.parse_args()
    began = time.monotonic()
    os.chdir(ROOT)
    python = given.python or environment()
    table = []
    for kind in [given.only] if given.only else ["side", "lora"]:
        table += federation(kind, given.rounds, python)
    print("\n| run | process | θ_c (SHA-256) | joined after, s | idle MiB | peak MiB |\n|---|---|---|---|---|---|")
    print("\n".join(table))
    print(f"\n{time.monotonic() - began:.0f} s")


def environment() -> str:
    """The devices' own: nothing in it but `hosfl-client` and what that needs."""
    folder = RUNS / "env"
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    if (folder / "ready").is_file():
        pip += ["--force-reinstall", "--no-deps"]  # it may have changed since
    else:
        print("making the devices' environment: pip install ./client")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([*pip, "./client"], check=True)
    (folder / "ready").touch()
    found = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert found.returncode != 0, "the devices' environment must have no PyTorch"
    return str(python)


def federation(kind: str, rounds: int, python: str) -> list[str]:
    """One run: rows of the table."""
    folder, recipe = RUNS / kind, HERE / f"{kind}.yaml"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    half = folder / "phone.onnx"
    print(f"{kind}: exporting the client's half")
    subprocess.run([*hosfl(), "export-client", "--config", recipe, "--out", half], check=True)
    address = f"127.0.0.1:{free_port()}"
    join = ["--server", address, "--insecure", "--name"]
    server = start(folder, "server", [
        *hosfl(), "serve", "--config", recipe, "--clients", HERE / "clients.yaml", "--insecure", "--listen", address,
        "--run", folder / "run", "--trainer.max_rounds", rounds, "--quorum", 3,
    ])  # fmt: skip
    everybody = [server]
    watch(everybody, until=lambda: listens(address))
    for name in ("phone-a", "phone-b"):
        everybody.append(start(folder, name, [
            python, "-m", "hosfl_client.cli", "join", *join, name, "--half", half, "--data", TEXTS[name],
            "--state", folder / name, "--threads", 1,
        ]))  # fmt: skip
    watch(everybody, until=lambda: all(one.settled for one in everybody[1:]))  # they wait for the third
    everybody.append(start(folder, "lab", [
        *hosfl(), "join", *join, "lab", "--config", client_recipe(folder, recipe), "--state", folder / "lab",
    ]))  # fmt: skip
    watch(everybody)
    server, *clients = everybody
    rows = []
    digests = {client.name: digest(folder / client.name / "shared.safetensors") for client in clients}
    for one in [server, *clients]:
        figures = [f"{one.joined - one.started:.1f}" if one.joined else ""]
        figures += [f"{value / MIB:.0f}" if value else "" for value in (one.idle, one.peak)]
        rows.append(f"| {kind} | {one.name} | {digests.get(one.name, '')[:16]} | {' | '.join(figures)} |")
    if len({*digests.values()}) != 1:
        print("\n".join(rows))
        raise SystemExit(f"{kind}: the clients do not hold the same θ_c")
    print(f"{kind}: {rounds} rounds, the same θ_c at all three: {digests['lab'][:16]}")
    return rows


def hosfl() -> list[str]:
    """The command, of this interpreter."""
    return [sys.executable, "-c", "from hosfl_lightning.cli import main; main()"]


def client_recipe(folder: Path, recipe: Path) -> Path:
    """The run's model, and the text of the client in PyTorch, all of it for training."""
    import yaml

    told = yaml.safe_load(recipe.read_text())
    told = {"model": told["model"], "data": told["data"]}
    told["model"]["init_args"].pop("optimizer")
    told["data"]["init_args"] |= {"files": [TEXTS["lab"]], "validation_files": ["CONTRIBUTING.md"]}
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(told))
    return path


def start(folder: Path, name: str, command: list[object]) -> Process:
    """In the background, with a log."""
    log = folder / f"{name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        words = [str(word) for word in command]
        return Process(name, subprocess.Popen(words, stdout=file, stderr=file, env=environment), log)


def watch(processes: list[Process], until: Callable[[], bool] = lambda: False) -> None:
    """Until that is so, or all have ended; when one fails, the others are ended."""
    try:
        while not until() and any(one.running.poll() is None for one in processes):
            for one in processes:
                one.look()
                if one.running.poll():
                    raise SystemExit(f"{one.name} has failed:\n{one.said[-2000:]}")
            time.sleep(0.05)
    except BaseException:
        for one in processes:
            one.running.kill()
        raise


def listens(address: str) -> bool:
    """Whether somebody takes connections there."""
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def digest(path: Path) -> str:
    """SHA-256 of θ_c in what a client keeps, by its name and bytes: a safetensors file, read without a library."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    total = hashlib.sha256()
    for name in sorted(name for name in header if name.endswith(".theta")):
        begin, end = header[name]["data_offsets"]
        total.update(name.encode() + body[begin:end])
    return total.hexdigest()


def free_port() -> int:
    """For the server."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
