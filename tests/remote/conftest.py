"""Servers and clients in processes of their own, and what a run of theirs leaves."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.fleet import Fleet
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.server.replay_log import ReplayLog
from tests.fleet.test_pipe import CASES, run

NAMES = ["ann", "bob", "cid"]


class Nursery:
    """Gives birth to processes, and buries them."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.remote.nursery"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.living: set[int] = set()

    def spawn(self, role: str, spec: Path, log: Path) -> int:
        born = int(self._say(json.dumps({"role": role, "spec": str(spec), "log": str(log)})))
        self.living.add(born)
        return born

    def status(self, process: int) -> int | None:
        """Its exit status; None: it lives."""
        ended = {int(number): status for number, status in json.loads(self._say("")).items()}
        self.living -= ended.keys()
        return ended.get(process)

    def clear(self) -> None:
        for process in [*self.living]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.living.clear()

    def close(self) -> None:
        self.clear()
        with self.process:
            pass

    def _say(self, line: str) -> str:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        print(line, file=stdin, flush=True)
        answer = stdout.readline()
        assert answer, "the nursery has ended"
        return answer


@dataclass
class Actor:
    """A server or a client, which may be started anew."""

    nursery: Nursery
    role: str
    spec: dict[str, Any]
    folder: Path
    name: str
    process: int = 0

    def start(self, **changes: Any) -> Actor:
        self.spec |= changes
        path = self.folder / f"{self.name}.json"
        path.write_text(json.dumps(self.spec))
        self.process = self.nursery.spawn(self.role, path, self.log)
        return self

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def status(self) -> int | None:
        return self.nursery.status(self.process)

    def wait(self, seconds: float = 60.0) -> int:
        until = time.monotonic() + seconds
        while (status := self.status) is None:
            assert time.monotonic() < until, f"{self.name} has not ended:\n{self.said}"
            time.sleep(0.02)
        return status

    def wait_to_say(self, words: str, seconds: float = 60.0, times: int = 1) -> None:
        until = time.monotonic() + seconds
        while self.said.count(words) < times:
            assert time.monotonic() < until, f"{self.name} has not said {words!r}:\n{self.said}"
            time.sleep(0.02)

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.kill(self.process, how)


@dataclass
class Stage:
    """A run: one server, its clients, and a folder for all of them."""

    nursery: Nursery
    folder: Path
    pretrained: str
    case: str = "hosfl"
    names: list[str] = field(default_factory=lambda: list(NAMES))
    port: int = 0
    sites: Path | None = None
    """Folders of certificates by name, the server's among them; None: plain text."""

    def __post_init__(self) -> None:
        self.port = self.port or free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.allow(self.names)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def allow(self, names: list[str | None]) -> None:
        (self.folder / "clients.yaml").write_text("".join(f"{i}: {name or ''}\n" for i, name in enumerate(names)))

    def server(self, **spec: Any) -> Actor:
        serve = {"quorum": len(self.names), "deadline": 30.0} | spec.pop("serve", {})
        fixed = {
            "case": self.case, "pretrained": self.pretrained, "listen": self.address, "folder": str(self.run),
            "clients": str(self.folder / "clients.yaml"), "serve": serve,
        }  # fmt: skip
        return Actor(self.nursery, "server", {**fixed, **self.certs("server"), **spec}, self.folder, "server")

    def client(self, name: str, **spec: Any) -> Actor:
        fixed = {
            "server": self.address, "name": name, "state": str(self.folder / f"state_{name}"),
            "pretrained": self.pretrained, "recipe": CASES[self.case].recipe, "clients": len(self.names),
        }  # fmt: skip
        return Actor(self.nursery, "client", {**fixed, **self.certs(name), **spec}, self.folder, name)

    def certs(self, name: str) -> dict[str, str]:
        return {} if self.sites is None else {"certs": str(self.sites / name)}

    def clients(self, **spec: Any) -> list[Actor]:
        return [self.client(name, **spec) for name in self.names]

    def ranks(self) -> list[Actor]:
        """A simulation in two processes, in the place of a server and clients."""
        fixed = {"case": self.case, "pretrained": self.pretrained, "folder": str(self.folder), "port": str(self.port)}
        specs = [{**fixed, "rank": str(number)} for number in range(2)]
        return [Actor(self.nursery, "rank", spec, self.folder, f"rank_{spec['rank']}") for spec in specs]

    def left(self) -> dict[str, Any]:
        """As `tests.fleet.test_pipe.run`, but for what only a remote run has."""
        state = max((one for _, one in checkpoints.whole(self.run)), key=lambda checkpoint: checkpoint["global_step"])
        log = self.run / "updates.log"
        return {
            "state": {name: tensor.tolist() for name, tensor in state["state_dict"].items()},
            "metrics": [comparable(row) for row in self.rows()],
            "log": [*ReplayLog.read(log).frames()] if log.exists() else None,
        }

    def rows(self) -> list[dict[str, str]]:
        """Of metrics.csv."""
        return [*csv.DictReader((self.run / "metrics.csv").read_text().splitlines())]

    def figures(self) -> dict[str, float]:
        """The last of what the server counts since it began, by names without ``fleet/``."""
        found = {k: v for row in self.rows() for k, v in row.items() if k.startswith("fleet/") and v}
        return {name.removeprefix("fleet/"): float(value) for name, value in found.items()}


def comparable(row: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "fleet/", "comm/", "compute/"))}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each case leaves in one process, where the clients are simulated one by one."""
    known: dict[str, dict[str, Any]] = {}

    def find(case: str, refused: tuple[int, str] | None = None, **settings: Any) -> dict[str, Any]:
        """Of a case; ``refused``: a client, and the kind of its message that is not taken in any round."""
        key = f"{case} {refused} {settings}"
        if key not in known:
            with refusing(refused), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* is refused: ")
                left = run(CASES[case], tiny_folder, tmp_path_factory.mktemp("undisturbed"), **settings)
            left["metrics"] = [comparable(row) for row in left["metrics"]]
            known[key] = left
        return known[key]

    return find


@contextmanager
def refusing(refused: tuple[int, str] | None) -> Iterator[None]:
    """A simulation in which the server does not take one kind of message of one client."""
    take = Fleet.take

    def taken(self: Fleet, request: Any, answer: Any, expected: Any) -> Any:
        if (request.client, answer.kind) != refused:
            return take(self, request, answer, expected)
        self.refuse(request.client, "as the test wants it")
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fleet, "take", taken)
        yield


@pytest.fixture
def stage(nursery: Nursery, tiny_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Makes the stage of a run."""
    yield lambda case="hosfl", **kwargs: Stage(nursery, tmp_path, str(tiny_folder), case, **kwargs)
    nursery.clear()
