"""Flower launches the server and its clients: the bits of a simulation of the same recipe."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.cli import main
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.server.replay_log import ReplayLog
from tests.recipe_runs import ROOT, SOURCES, command_line
from tests.remote.conftest import free_port

APP = ROOT / "examples" / "flower"
RECIPE = [f"--config={APP / 'client.yaml'}", f"--config={APP / 'server.yaml'}"]
ROUNDS = 3
HOW = (
    "needs Flower, in an environment of its own: python3.11 -m venv DIR && DIR/bin/pip install -c "
    "examples/flower/constraints.txt -e '.[flower,remote]'; then pytest --flower DIR/bin/python"
)


class Federation:
    """A SuperLink and two SuperNodes, each with a working folder and a Flower home of its own."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        self.link, self.listen = free_port(), free_port()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.spawn("link", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
                   "--port", str(self.link))  # fmt: skip
        until = time.monotonic() + 60
        while not self.answers():
            assert time.monotonic() < until, self.said
            time.sleep(0.1)
        for node in range(2):
            self.spawn(f"node{node}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.link}",
                       "--port", str(free_port()), "--node-config", f"partition-id={node}")  # fmt: skip
        (self.home("cli") / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.link}"\ninsecure = true\n'
        )

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.link}/health", timeout=1):
                return True
        except OSError:
            return False

    def home(self, name: str) -> Path:
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def environment(self, name: str) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(self.home(name)), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip

    def spawn(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [self.programs / program, *args], cwd=self.home(name), env=self.environment(name), stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process)

    def call(self, program: str, *args: str) -> str:
        done = subprocess.run(
            [self.programs / program, *args], cwd=self.home("cli"), env=self.environment("cli"), capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.said}"
        return done.stdout

    @property
    def said(self) -> str:
        return "".join(f"\n{log.stem}:\n{log.read_text()}" for log in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in self.started:
            process.terminate()  # what they started ends with them
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def federation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Federation]:
    python = request.config.getoption("--flower")
    if python is None:
        pytest.skip(HOW)
    federation = Federation(Path(python).absolute().parent, tmp_path / "flower")
    federation.folder.mkdir()
    try:
        federation.start()
        yield federation
    finally:
        federation.stop()


def left(run: Path) -> dict[str, Any]:
    """The state after the last round, and every update."""
    state = max((one for _, one in checkpoints.whole(run)), key=lambda checkpoint: checkpoint["global_step"])
    return {
        "rounds": state["global_step"],
        "state": {name: tensor.tolist() for name, tensor in state["state_dict"].items()},
        "log": [*ReplayLog.read(run / "updates.log").frames()],
    }


def test_gives_the_bits_of_a_simulation(federation: Federation, tmp_path: Path) -> None:
    here = f"127.0.0.1:{federation.listen}"
    settings = {"rounds": ROUNDS, "run": f'"{tmp_path / "run"}"', "listen": f'"{here}"', "server": f'"{here}"'}
    config = " ".join(f"{name}={value}" for name, value in settings.items())
    said = federation.call("flwr", "run", str(APP), "here", "--stream", "--run-config", config)
    [run] = json.loads(federation.call("flwr", "list", "--format", "json"))["runs"]
    assert run["status"] == "finished:completed", said + federation.said
    federation.call(
        "hosfl", "fit", *RECIPE, f"--trainer.max_rounds={ROUNDS}", "--trainer.simulation=per_client",
        f"--trainer.default_root_dir={tmp_path / 'simulated'}", "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    there, simulated = left(tmp_path / "run"), left(tmp_path / "simulated" / "version_0")
    assert there["rounds"] == ROUNDS
    for part in simulated:
        assert there[part] == simulated[part], part


@pytest.mark.parametrize(
    "words", [["serve", *RECIPE], ["join", RECIPE[0], "--server=127.0.0.1:1", "--index=0"]], ids=["serve", "join"]
)
def test_the_recipes_are_understood(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with command_line(), pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err
