"""What a connected client costs a server that waits, and how soon all are back when one side was killed."""

from __future__ import annotations

import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import remote_stub
from benchmarks.remote_children import Child, Family
from benchmarks.remote_stub import Stage


def idle(folder: Path, secure: bool, first: int, more: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Bytes in memory of the server, per client of ``more`` that join when ``first`` are there; after a step too."""
    stage = Stage.built(folder, first + more, secure, shape)
    with Family(folder) as family:
        host = family.born(partial(remote_stub.host, stage, 0), "host")
        port, held = host.answer()["port"], []
        for names in (stage.names[:first], stage.names[first:]):
            family.born(partial(remote_stub.crowd, stage, names, port), f"crowd_{len(names)}")
            host.ask(do="until", arrivals=stage.names.index(names[-1]) + 1)
            time.sleep(1.0)
            held.append(host.ask(do="rss")["rss"])
        host.ask(do="steps", steps=1)
        host.ask(do="until", arrivals=0)
        time.sleep(1.0)
        held.append(host.ask(do="rss")["rss"])
    return {
        "link": "mTLS" if secure else "plain", "clients": more, "bytes": (held[1] - held[0]) / more,
        "bytes_after_a_step": (held[2] - held[0]) / more,
    }  # fmt: skip


def server_killed(folder: Path, clients: int, outage: float, repeats: int, secure: bool = False) -> dict[str, Any]:
    """Seconds from when a new server listens until all clients are in, after ``outage`` seconds without one."""
    stage = Stage.built(folder, clients, secure, (1, 8, 8))
    port, taken = free_port(), []
    with Family(folder) as family:
        host = _host(family, stage, port)
        host.answer()
        for name in stage.names:
            family.born(partial(remote_stub.client, stage, name, port), name)
        for _ in range(repeats):
            host.ask(do="until", arrivals=clients)
            host.kill()
            time.sleep(outage)
            host = _host(family, stage, port)
            listening = host.answer()["listening"]
            taken.append(max(host.ask(do="until", arrivals=clients)["arrivals"]) - listening)
    return {"outage": outage, "clients": clients, "seconds": taken}


def client_killed(folder: Path, clients: int, repeats: int, secure: bool = False) -> dict[str, Any]:
    """Seconds from when a client's new process begins until it is in; it finds its libraries imported."""
    stage, taken = Stage.built(folder, clients, secure, (1, 8, 8)), []
    with Family(folder) as family:
        host = _host(family, stage, 0)
        port = host.answer()["port"]
        born = [family.born(partial(remote_stub.client, stage, name, port), name) for name in stage.names]
        host.ask(do="until", arrivals=clients)
        for repeat in range(repeats):
            host.order(do="until", arrivals=clients + repeat + 1)
            born[0].kill()
            born[0] = family.born(partial(remote_stub.client, stage, stage.names[0], port), stage.names[0])
            taken.append(host.answer()["arrivals"][-1] - born[0].began)
    return {"clients": clients, "seconds": taken}


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _host(family: Family, stage: Stage, port: int) -> Child:
    return family.born(partial(remote_stub.host, stage, port), "host")
