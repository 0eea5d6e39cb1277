"""A client without torch beside one with it: install, start, memory, rounds, peaks, on one thread.

    python -m benchmarks.device --out docs/results/device

writes ``figures.json`` there, and the page beside the folder; ``--parts`` measures some again and keeps the others of
the file. An environment for the client is made (``pip install ./client``) unless ``--python`` names one's interpreter.
Every figure is of a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.device_install import environment, installed, size_of_torch_client
from benchmarks.device_join import joined
from benchmarks.device_page import page
from benchmarks.device_recipe import KINDS, export, llama
from hosfl_lightning.run.identity import hardware

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        folder: For what is made.
        python: Of the client's environment.
        quick: Whether as little as there can be is measured.
    """

    folder: Path
    python: str
    quick: bool

    @property
    def repeats(self) -> int:
        """Of what is timed."""
        return 1 if self.quick else 7

    def client(self, role: str, *given: object) -> dict[str, Any]:
        """See `benchmarks.device_child`."""
        return _run(self.python, [ROOT], "benchmarks.device_child", role, *given)

    def torch_client(self, role: str, *given: object) -> dict[str, Any]:
        """See `benchmarks.device_torch`."""
        return _run(sys.executable, [ROOT, ROOT / "client"], "benchmarks.device_torch", role, *given)

    def halves(self, name: str) -> dict[str, tuple[Path, Path]]:
        """By kind: a half that was exported, made once, and the terms of its run."""
        found = {}
        for kind in KINDS:
            own = self.folder / f"{name}_{kind}"
            if not own.exists():
                export(self.pretrained(name), kind, own)
            found[kind] = own / "phone.onnx", own / "terms"
        return found

    def pretrained(self, name: str) -> str:
        """``tiny_lm``, or ``llama_<hidden size>``."""
        if name == "tiny_lm":
            return name
        folder = self.folder / name
        return str(folder) if folder.exists() else llama(folder, int(name.removeprefix("llama_")))


def install(place: Place) -> Any:
    """Bytes of packages."""
    return {"client": installed(place.python), "torch": size_of_torch_client()}


def start(place: Place) -> Any:
    """From the command to the run, and what is resident then: of a server that waits for more clients."""
    half, _ = place.halves("tiny_lm")["lora"]
    return joined(place.folder, place.python, half, 1 if place.quick else 5, 1 if place.quick else 2)


def memory(place: Place) -> Any:
    """Resident after imports, and in a round of tiny_lm."""
    found: dict[str, Any] = {}
    for kind, (half, terms) in place.halves("tiny_lm").items():
        given = terms, 8, 128, 1 if place.quick else 5
        found[kind] = {"client": place.client("held", half, *given),
                       "torch": place.torch_client("held", "tiny_lm", kind, *given)}  # fmt: skip
    return found


def rounds(place: Place) -> Any:
    """Processor time of a client's round."""
    rows = []
    for name in ["tiny_lm"] if place.quick else ["tiny_lm", "llama_512", "llama_1024"]:
        for kind, (half, terms) in place.halves(name).items():
            for examples, length in ((8, 128), (1, 32)):
                given = terms, examples, length, place.repeats
                own = [place.client("took", half, *given) for _ in range(1 if place.quick else 2)]
                rows.append({
                    "model": name, "kind": kind, "shape": [examples, length],
                    "client": {key: median(one[key] for one in own) for key in own[0]},
                    "torch": place.torch_client("took", place.pretrained(name), kind, *given),
                })  # fmt: skip
    return rows


def peaks(place: Place) -> Any:
    """Of a round, and of one forward of ONNX Runtime in a process that runs nothing else."""
    rows = []
    for name in ["tiny_lm"] if place.quick else ["tiny_lm", "llama_512", "llama_1024"]:
        for kind, (half, terms) in place.halves(name).items():
            given = half, terms, 8, 128
            rows.append({
                "model": name, "kind": kind, "forward": place.client("forward", *given, 1),
                "round": place.client("held", *given, 1 if place.quick else 3),
            })  # fmt: skip
    return rows


PARTS: dict[str, Callable[[Place], Any]] = {
    "install": install, "start": start, "memory": memory, "rounds": rounds, "peaks": peaks,
}  # fmt: skip


def _run(python: str, path: list[Path], module: str, *given: object) -> dict[str, Any]:
    searched = os.pathsep.join(map(str, path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": searched}
    done = subprocess.run(
        [python, "-m", module, *map(str, given)], capture_output=True, check=False, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{module} {given} has ended with {done.returncode}:\n{done.stderr.decode()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of figures.json; the page is beside it")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--python", help="of an environment that has hosfl-client; default: one is made")
    parser.add_argument("--quick", action="store_true", help="as little as there can be, to see that it runs")
    own = parser.parse_args(argv)
    torch.set_num_threads(1)
    own.out.mkdir(parents=True, exist_ok=True)
    file = own.out / "figures.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        python = os.path.abspath(own.python) if own.python else environment(Path(folder), ROOT)
        place = Place(Path(folder), python, own.quick)
        for part in own.parts:
            measured = PARTS[part](place)
            found[part] = {
                "found": measured, "date": datetime.date.today().isoformat(),
                "machine": hardware(torch.device("cpu")), "load": os.getloadavg()[0],
            }  # fmt: skip
            file.write_text(json.dumps(found, indent=1) + "\n")
            own.out.with_suffix(".md").write_text(page(found))
            print(f"{part}: {json.dumps(measured)}", flush=True)


if __name__ == "__main__":
    main()
