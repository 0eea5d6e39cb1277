"""A server and clients of ours without a model: what is sent is ready, all the rest is as in a run."""

from __future__ import annotations

import cProfile
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.remote_children import Talk
from hosfl_client.connection import Connection
from hosfl_client.limits import Limits
from hosfl_lightning import __version__
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.clients.joined import Joined
from hosfl_lightning.fleet.admission import Admission
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.fleet.member import Membership
from hosfl_lightning.fleet.remote import RemoteFleet
from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.credentials import Site
from hosfl_lightning.link.gate import Gate
from hosfl_lightning.link.reception import Reception
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.wire import Multiplier, ProjectedGradients, SmashedData, StepRequest, Terms, Update

TERMS = Terms(0, None, "Prepared", {}, 0, [], {}, {}, {})
BASIS = {"kind": "shared_directions", "probes": 4}
#: All clients are on one machine, which otherwise may come in 60 times a minute.
LIMITS = Limits(handshakes=1 << 20)


@dataclass(frozen=True)
class Stage:
    """Where a run without a model takes place.

    Attributes:
        folder: With the list of clients, and their certificates.
        names: Of the clients.
        secure: Mutual TLS; else plain text.
        shape: Of z, ``(B, S, h)``, fp32.
    """

    folder: Path
    names: list[str]
    secure: bool
    shape: tuple[int, int, int]

    @classmethod
    def built(cls, folder: Path, clients: int, secure: bool, shape: tuple[int, int, int]) -> Stage:
        """In an empty folder: the list of clients, and certificates if they are needed."""
        stage = cls(folder, [f"client_{number}" for number in range(clients)], secure, shape)
        folder.mkdir()
        (folder / "clients.yaml").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(stage.names)))
        if secure:
            authority = Authority.make(folder / "ca")
            authority.server(["127.0.0.1"], folder / "server")
            for name in stage.names:
                authority.client(name, folder / name)
        return stage

    def server_credentials(self) -> Any:
        """gRPC's."""
        return Site.load(self.folder / "server", "server").server_credentials() if self.secure else None

    def client_credentials(self, name: str) -> Any:
        """gRPC's."""
        return Site.load(self.folder / name, "client").channel_credentials() if self.secure else None


class Prepared(Endpoint):
    """A client whose answers are ready, and a server's replica of it: a step changes a count."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.client = SimpleNamespace(optimizer=ZerothOrder([nn.Parameter(torch.zeros(4), requires_grad=False)]))
        self.held_out_batches = 0
        z, labels = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.zeros(shape[:2]).long()
        self.z = SmashedData.pack(0, 0, z, labels, torch.ones(shape[:2], dtype=torch.bool))
        self.coefficients = torch.ones(4)

    def make_client(self, half: nn.Module) -> Any:
        """There is none."""

    def handle(self, requests: Any) -> Any:
        """One answer, or none to what is for everybody."""
        [request] = requests
        match request:
            case StepRequest():
                return [replace(self.z, round=request.round, client=request.client)]
            case Multiplier():
                return [ProjectedGradients(request.round, request.client, BASIS, self.coefficients, 7)]
            case Update():
                self.client.optimizer.param_groups[0]["step"] = request.step
        return []


def client(stage: Stage, name: str, port: int, _: Talk | None = None) -> None:
    """One of the clients, as `hosfl_lightning.join` connects it."""
    joined = Joined(name, __version__, lambda terms: Prepared(stage.shape))
    Connection(f"127.0.0.1:{port}", stage.client_credentials(name), joined).run()


def crowd(stage: Stage, names: list[str], port: int, _: Talk) -> None:
    """Some of the clients in one process, a thread each."""
    threads = [threading.Thread(target=client, args=(stage, name, port), daemon=True) for name in names]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()


class Host:
    """The server: takes orders, and does nothing between them."""

    def __init__(self, stage: Stage, port: int, talk: Talk) -> None:
        self.stage, self.talk, self.arrivals = stage, talk, list[float]()
        gate = Gate(str(stage.folder / "clients.yaml"), str(stage.folder / "server") if stage.secure else None)
        reception = Reception(f"127.0.0.1:{port}", gate.server_credentials(), LIMITS)
        listening = time.monotonic()
        endpoint, self.channel, self.round = Prepared(stage.shape), Channel(serialize=True), 0
        admission = Admission(reception, gate, TERMS, self.channel, endpoint.client.optimizer, self.notify)
        self.fleet = RemoteFleet(endpoint, self.channel, admission, Membership())
        z, _, mask = endpoint.z.unpack()
        self.multiplier = Multiplier.pack(0, 0, z, mask)
        talk.say(port=reception.port, listening=listening)

    def notify(self, text: str) -> None:
        """Who came when."""
        if " is in (" in text:
            self.arrivals.append(time.monotonic())

    def until(self, arrivals: int) -> dict[str, Any]:
        """So many have come in since the server began, some of them anew."""
        while len(self.arrivals) < arrivals:
            self.fleet.gather_quorum(self.round, 0)
            time.sleep(0.002)
        return {"arrivals": self.arrivals}

    def steps(self, steps: int, profile: str = "") -> dict[str, Any]:
        """Rounds: when each of them ended, and the ledger of the last."""
        profiler = cProfile.Profile() if profile else None
        ends = [time.perf_counter()]
        for _ in range(steps):
            if profiler:
                profiler.enable()
            self.step()
            if profiler:
                profiler.disable()
            ends.append(time.perf_counter())
        if profiler:
            profiler.dump_stats(profile)
        return {"ends": ends, "ledger": [[sent.kind, sent.direction, sent.bytes] for sent in self.channel.ledger]}

    def step(self) -> None:
        """z up, λ down, scalars up, the update down."""
        fleet, round = self.fleet, self.round
        self.channel.clear()
        fleet.gather_quorum(round, len(self.stage.names))
        clients = fleet.connected
        fleet.assemble(clients)
        z = fleet.ask({k: StepRequest(round, k) for k in clients}, SmashedData)
        asked = {message.client: replace(self.multiplier, round=round, client=message.client) for message in z}
        v = fleet.ask(asked, ProjectedGradients)
        assert [message.client for message in v] == clients, fleet.refused
        self.round += 1
        weights = [1 / len(v)] * len(v)
        update = Update(round, BASIS, v[0].coefficients, {"name": "SGD", "lr": 1e-3}, self.round, clients, weights)
        fleet.tell(update, clients)

    def rss(self) -> dict[str, int]:
        """Bytes of the process in memory."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"rss": pages * os.sysconf("SC_PAGE_SIZE")}


def host(stage: Stage, port: int, talk: Talk) -> None:
    """A `Host` until there are no more orders."""
    served = Host(stage, port, talk)
    for order in talk:
        what = order.pop("do")
        talk.say(**getattr(served, what)(**order))
    served.fleet.close("the run is over", over=True)
