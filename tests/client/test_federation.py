"""Devices without PyTorch and a client with it in one run over gRPC: the same bits, killed on the way or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosfl_client.check import CheckError, check, check_half
from hosfl_client.half import OnnxHalf
from tests.recipe_runs import ROOT
from tests.remote.conftest import Stage
from tests.remote.test_kills import finished, holds_what_the_server_holds

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
            str(data), "--insecure", "--name", name, "--state", str(run.folder / f"state_{name}"), "--threads", "1",
            "--save-every", "1",
        ]  # fmt: skip

    def start(self) -> Device:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'client'}"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        return self

    def wait(self, status: int = 0) -> None:
        assert self.process.wait(60) == status, self.log.read_text()


@pytest.fixture
def devices() -> Iterator[list[Device]]:
    started: list[Device] = []
    yield started
    for device in started:
        device.process.kill()
        device.process.wait()


@pytest.mark.parametrize(("case", "recipe"), [("side adapter", {"side": True}), ("hosfl", {})])
def test_all_hold_the_same_bits(
    case: str,
    recipe: dict[str, Any],
    stage: Any,
    exported: Any,
    devices: list[Device],
) -> None:
    half, run = exported(**recipe), stage(case)
    server = run.server(settings={"max_rounds": 4, "clients_per_round": 3}).start()
    torch_client = run.client("ann").start()
    dies = str(run.folder / "died")
    devices += [Device(run, name, half, dies if name == "bob" else "-") for name in DEVICES]
    for device in devices:
        device.start()
    devices[0].wait(-signal.SIGKILL)
    devices[0].start()
    finished(server, torch_client)
    for device in devices:
        device.wait()
    assert "took part in 4 round(s)" in devices[1].log.read_text()
    assert "replays the updates from round" in server.said, server.said
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
