"""What clients on other machines cost, on one machine: steps, rounds, memory, kills, and bytes on the wire.

    python -m benchmarks.remote --out OUT

writes ``remote.json`` and ``remote.md`` to OUT; ``--parts`` measures some again and keeps the others of the file.
Every process is forked from this one, which has imported everything. Two cores are used, whatever there are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The libraries that take seconds to import; none of them may have started a thread when the processes fork.
import hosfl_lightning.algorithms
import hosfl_lightning.callbacks
import hosfl_lightning.data
import hosfl_lightning.join
import hosfl_lightning.models
import hosfl_lightning.recipe  # noqa: F401
from benchmarks import remote_peers, remote_rounds, remote_steps
from benchmarks.remote_page import page
from benchmarks.remote_rounds import Place
from hosfl_client.connection import Backoff
from hosfl_lightning.run.identity import hardware


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        shape: Of z in a step, ``(B, S, h)``, fp32.
        clients: Of a step, one after the other.
        steps: In a block.
        blocks: Of each system, in turn.
        rounds: Of the recipe.
        repeats: Of its runs, and of kills.
        idle: Clients that are there before, and that join then.
        outages: Seconds without a server, and how often.
    """

    shape: tuple[int, int, int] = (8, 128, 256)
    clients: tuple[int, ...] = (1, 8)
    steps: int = 30
    blocks: int = 10
    rounds: int = 8
    repeats: int = 3
    idle: tuple[int, int] = (10, 100)
    outages: tuple[tuple[float, int], ...] = ((1.0, 5), (30.0, 3))


QUICK = Size((1, 8, 8), (1, 2), 2, 1, 2, 1, (1, 2), ((0.1, 1),))
LINKS = (False, True)


def places() -> list[Place]:
    """Two cores for either side, where one process has two threads, or one; one core, where work is all there is."""
    first = sorted(os.sched_getaffinity(0))[:2]
    two = Place("two cores; one process and the server: 2 threads, clients: 1 each", {*first}, len(first), 1)
    return [two, Place("two cores; 1 thread each", {*first}, 1, 1), Place("one core; 1 thread each", {first[0]}, 1, 1)]


def steps(folder: Path, size: Size) -> Any:
    """z up, λ down, scalars up, the update down."""
    return [
        remote_steps.measure(folder / f"{clients}_{secure}", clients, secure, size.shape, size.steps, size.blocks)
        for secure in LINKS
        for clients in size.clients
    ]


def rounds(folder: Path, size: Size) -> Any:
    """Of the recipe."""
    chosen = places()[:1] if size is QUICK else places()
    return [remote_rounds.compare(folder / str(i), size.rounds, size.repeats, place)
            for i, place in enumerate(chosen)]  # fmt: skip


def memory(folder: Path, size: Size) -> Any:
    """Of a server, by clients that are connected and idle."""
    return [remote_peers.idle(folder / str(secure), secure, *size.idle, size.shape) for secure in LINKS]


def kills(folder: Path, size: Size) -> Any:
    """Of the server and of a client."""
    clients, backoff = max(size.clients), Backoff()
    return {
        "backoff": f"{backoff.first:g} s, twice that, and so on, {backoff.cap:g} s at most, less a random half",
        "server": [remote_peers.server_killed(folder / f"server_{i}", clients, outage, repeats)
                   for i, (outage, repeats) in enumerate(size.outages)],
        "client": remote_peers.client_killed(folder / "client", clients, size.repeats),
    }  # fmt: skip


def wire(folder: Path, size: Size) -> Any:
    """Bytes at the sockets and in the ledger, of the recipe."""
    return [remote_rounds.counted(folder / str(secure), size.rounds, secure, places()[0]) for secure in LINKS]


PARTS: dict[str, Callable[[Path, Size], Any]] = {
    "steps": steps, "rounds": rounds, "memory": memory, "kills": kills, "wire": wire,
}  # fmt: skip


def shown(own: argparse.Namespace) -> str:
    """The command, without the machine's paths."""
    parts = [] if own.parts == list(PARTS) else ["--parts", *own.parts]
    return " ".join(["python -m benchmarks.remote --out OUT", *(["--quick"] if own.quick else []), *parts])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="as little as there can be, to see that it runs")
    own = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whose children end as well
    torch.set_num_threads(1)
    os.sched_setaffinity(0, places()[0].cores)
    file = own.out / "remote.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    own.out.mkdir(parents=True, exist_ok=True)
    for part in own.parts:
        with tempfile.TemporaryDirectory() as folder:
            measured = PARTS[part](Path(folder), QUICK if own.quick else Size())
        found[part] = {
            "found": measured, "command": shown(own), "date": datetime.date.today().isoformat(),
            "machine": hardware(torch.device("cpu")), "load": os.getloadavg()[0],
        }  # fmt: skip
        file.write_text(json.dumps(found, indent=1) + "\n")
        (own.out / "remote.md").write_text(page(found))
        print(f"{part}: {json.dumps(measured)}", flush=True)


if __name__ == "__main__":
    main()
