"""A step over the network without a model, beside gRPC alone and gRPC with a checksum."""

from __future__ import annotations

import os
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import remote_bare, remote_stub
from benchmarks.remote_children import Child, Family
from benchmarks.remote_stub import LIMITS, Stage

OURS, BARE, CHECKED = "ours", "gRPC", "gRPC, SHA-256"


def measure(folder: Path, clients: int, secure: bool, shape: tuple[int, int, int], steps: int, repeats: int) -> Any:
    """Blocks of ``steps`` of the three in turn, ``repeats`` times: seconds, and processor seconds, of a step."""
    stage = Stage.built(folder, clients, secure, shape)
    with Family(folder) as family:
        systems = {OURS: _ours(family, stage)}
        host = systems[OURS][0]
        sizes = {kind: size for kind, _, size in host.ask(do="steps", steps=2)["ledger"]}
        systems |= {name: _bare(family, stage, sizes, name == CHECKED) for name in (BARE, CHECKED)}
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        cpu = dict.fromkeys(systems, 0.0)
        for repeat in range(repeats + 1):
            for name, children in systems.items():
                before = _cpu(children)
                order = {"do": "steps"} if name == OURS else {}
                ends = children[0].ask(**order, steps=steps if repeat else 2)["ends"]
                if repeat:  # the first warms up
                    cpu[name] += _cpu(children) - before
                    seconds[name] += [end - begin for begin, end in pairwise(ends)]
    return {
        "clients": clients, "link": "mTLS" if secure else "plain", "sizes": sizes,
        "median": {name: statistics.median(taken) for name, taken in seconds.items()},
        "minimum": {name: min(taken) for name, taken in seconds.items()},
        "cpu": {name: taken / (steps * repeats) for name, taken in cpu.items()},
    }  # fmt: skip


def _ours(family: Family, stage: Stage) -> list[Child]:
    host = family.born(partial(remote_stub.host, stage, 0), "host")
    port = host.answer()["port"]
    clients = [family.born(partial(remote_stub.client, stage, name, port), name) for name in stage.names]
    host.ask(do="until", arrivals=len(clients))
    return [host, *clients]


def _bare(family: Family, stage: Stage, sizes: dict[str, int], checked: bool) -> list[Child]:
    options, name = LIMITS.channel_options(), "checked" if checked else "bare"
    own = stage.server_credentials if stage.secure else None
    server = family.born(partial(remote_bare.server, len(stage.names), sizes, own, options, checked), name)
    port, clients = server.answer()["port"], []
    for who in stage.names:
        theirs = partial(stage.client_credentials, who) if stage.secure else None
        role = partial(remote_bare.client, port, sizes, theirs, options, checked)
        clients.append(family.born(role, f"{name}_{who}"))
    return [server, *clients]


def _cpu(children: list[Child]) -> float:
    """Processor seconds of all of them, in user space and in the kernel."""
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
