"""Devices without PyTorch and a client with it in one run over gRPC: the same bits, killed on the way or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosfl_client.check import CheckError, check, check_half
from hosfl_client.half import OnnxHalf
from hosfl_lightning.link.authority import Authority
from tests.recipe_runs import ROOT
from tests.remote import actors
from tests.remote.conftest import Stage
from tests.remote.test_kills import holds_what_the_server_holds

DEVICES = ("bob", "cid")
#: A device that ends itself before it applies the update of round 1, once; and says what it has imported.
COMMAND = """
import os, signal, sys
from pathlib import Path
sys.modules["torch"] = None  # who imports it fails
from hosfl_client import cli, endpoint
flag, handle = Path(sys.argv.pop(1)), endpoint.Endpoint.handle
def dying(self, requests):
    if requests[0].kind == "update" and requests[0].round == 1 and flag.name != "-" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return handle(self, requests)
endpoint.Endpoint.handle = dying
cli.main()
assert not [name for name in sys.modules if name.split(".")[0] in ("hosfl_lightning", "transformers", "cryptography")]
"""


class Device:
    """One ``hosfl-client join``, as a device runs it."""

    def __init__(self, run: Stage, name: str, half: Path, flag: str = "-") -> None:
        self.log = run.folder / f"{name}.log"
        (data := run.folder / f"{name}.txt").write_text(f"the text of {name}, which stays where it is; " * 9)
        self.command = [
            sys.executable, "-c", COMMAND, flag, "join", "--server", run.address, "--half", str(half), "--data",
            str(data), *who(run, name), "--state", str(run.folder / f"state_{name}"), "--threads", "1",
            "--save-every", "1",
        ]  # fmt: skip

    def start(self) -> Device:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'client'}"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        return self

    def wait(self, status: int) -> None:
        assert self.process.wait(60) == status, self.log.read_text()

    def join(self, seconds: float) -> None:
        self.wait(0)


def who(run: Stage, name: str) -> list[str]:
    return ["--insecure", "--name", name] if run.sites is None else ["--certs", str(run.sites / name)]


@pytest.fixture
def devices() -> Iterator[list[Device]]:
    started: list[Device] = []
    yield started
    for device in [one for one in started if hasattr(one, "process")]:
        device.process.kill()
        device.process.wait()


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    authority = Authority.make(tmp_path / "ca")
    authority.server(["127.0.0.1"], tmp_path / "server")
    for name in ("ann", *DEVICES):
        authority.client(name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("case", "recipe"), [("side adapter", {"side": True}), ("labels stay", {"labels": "client", "head": 2})]
)
def test_all_hold_the_same_bits(
    case: str,
    recipe: dict[str, Any],
    tiny_folder: Path,
    exported: Any,
    devices: list[Device],
    sites: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Server and client in PyTorch are threads of this process; one of the two runs with certificates."""
    run = Stage(None, tmp_path / "run", str(tiny_folder), case, sites=None if "side" in recipe else sites)  # type: ignore[arg-type]
    flag = str(tmp_path / "died")
    devices += [Device(run, name, exported(**recipe), flag if name == "bob" else "-").start() for name in DEVICES]

    def revive() -> None:
        devices[0].wait(-signal.SIGKILL)
        devices[0].start()

    beside = [threading.Thread(target=one, daemon=True) for one in (
        revive, lambda: actors.client(run.client("ann").spec),
    )]  # fmt: skip
    for thread in beside:
        thread.start()
    actors.server(run.server(settings={"max_rounds": 4, "clients_per_round": 3}).spec)
    for one in (*beside, *devices):
        one.join(60)
    said = capfd.readouterr().out
    assert "ended: the run is over" in said and "bob replays the updates from round" in said, said
    assert "took part in 4 round(s)" in devices[1].log.read_text()
    holds_what_the_server_holds(run, ["ann", *DEVICES])


def test_a_device_checks_itself(exported: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Every part is tried; a half whose weights have moved since is found out."""
    for recipe in ({}, {"side": True}):
        check(exported(**recipe), 1)
        said = capfd.readouterr().out
        assert said.count("the same bits") == 7 and said.count("of the largest") == 2 + bool(recipe)
    half = OnnxHalf(exported())
    next(iter(half.parameters().values()))[0, 0] += 1
    with pytest.raises(CheckError, match="not as it was recorded: directions and rule"):
        check_half(half, half.manifest, exported().parent, lambda _: None)
    half = OnnxHalf(exported())
    with half.perturbed(lambda _, theta: theta + np.float32(0.1)), pytest.raises(CheckError, match="recorded: z"):
        check_half(half, half.manifest, exported().parent, lambda _: None)
