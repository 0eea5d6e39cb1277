"""What a person copies from `examples/remote` and from the docs: it runs, and its commands are understood."""

from __future__ import annotations

import _thread
import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM, cli
from hosfl_lightning.clients.connection import Connection
from hosfl_lightning.data import DocstringData
from hosfl_lightning.link import command as certs
from hosfl_lightning.optim import AdamW
from hosfl_lightning.split import Lora, LoraHalf
from tests.recipe_runs import ROOT, SOURCES, command_line
from tests.remote.conftest import free_port

EXAMPLES = ROOT / "examples" / "remote"
UNITS = sorted(EXAMPLES.glob("*.service"))
#: `hosfl` as it is installed.
COMMAND = "#!{python}\nfrom hosfl_lightning.cli import main\n\nmain()\n"
#: A client that waits for ever, without the seconds that a real one takes to begin.
WAITING = """\
#!{python}
import time
try:
    print("waits", flush=True)  # from here on it can be interrupted
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.3)
    print("takes leave", flush=True)
    raise SystemExit(130)
"""
LITTLE = [
    f"--data.init_args.{name}={value}"
    for name, value in {
        "max_bytes_per_client": 9000, "validation_bytes_per_client": 1500, "test_bytes_per_client": 1500,
        "batch_size": 1,
    }.items()
]  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Any]:
    """Starts a script of the examples in an empty folder, as from a clone in which `hosfl` is installed."""
    hosfl = tmp_path / "bin" / "hosfl"
    hosfl.parent.mkdir()
    hosfl.write_text(COMMAND.format(python=sys.executable))
    hosfl.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{hosfl.parent}:{os.environ['PATH']}", "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1",
        "PORT": str(free_port()), "COLUMNS": "200",
    }  # fmt: skip
    folder = tmp_path / "work"
    folder.mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *args: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                ["bash", str(EXAMPLES / script), *args], cwd=folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=heed_interrupts,
            )
        )  # fmt: skip
        return started[-1]

    start.folder = folder  # type: ignore[attr-defined]
    yield start
    for process in started:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)  # its session, of several groups
        process.communicate(timeout=30)


def test_the_two_commands(shell: Any) -> None:
    clients = shell("clients.sh", *LITTLE)  # first: it waits for the certificates
    server = shell("server.sh", "--trainer.max_rounds=2", "--trainer.val_check_interval=1", *LITTLE)
    said = server.communicate(timeout=200)[0]
    assert server.returncode == 0, said
    assert "HOSFL: 2 rounds, 3 of 3 clients" in said
    assert (shell.folder / "runs" / "remote" / "run" / "summary.json").is_file()
    heard = clients.communicate(timeout=30)[0]
    assert clients.returncode == 0, heard
    for name in ("lab-a", "lab-b", "lab-c"):
        assert re.search(rf"^{name}  .*took part in 2 round\(s\)\n(?:.*\n)*?{name}  the run is over$", heard, re.M), (
            heard
        )


def test_the_clients_end_by_ctrl_c(shell: Any) -> None:
    """Each of them, and the script when all of them have ended."""
    certificates(shell.folder / "runs" / "remote" / "certs", "lab-a", "lab-b", "lab-c")
    (shell.folder.parent / "bin" / "hosfl").write_text(WAITING.format(python=sys.executable))
    clients = shell("clients.sh")
    assert {clients.stdout.readline() for _ in range(3)} == {f"lab-{one}  waits\n" for one in "abc"}
    clients.send_signal(signal.SIGINT)
    clients.wait(timeout=30)
    left = subprocess.run(["pgrep", "-s", str(clients.pid)], capture_output=True, text=True, check=False).stdout
    said = clients.communicate(timeout=30)[0]
    assert (clients.returncode, left) == (130, ""), said
    assert set(said.splitlines()) == {f"lab-{one}  takes leave" for one in "abc"}


def test_a_client_that_is_interrupted_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Connection) -> str:
        raise KeyboardInterrupt

    certificates(tmp_path, "lab-a")
    monkeypatch.setattr(Connection, "run", interrupted)
    settings = [f"--config={EXAMPLES}/client.yaml", f"--certs={tmp_path}/lab-a", f"--state={tmp_path}/state"]
    with command_line(), pytest.raises(SystemExit) as end:
        cli.main(["join", "--server=localhost:1", *settings])
    assert (end.value.code, capsys.readouterr().err) == (130, "hosfl: interrupted; the same command goes on\n")


def heed_interrupts() -> None:
    """As in a terminal: what a job in the background starts ignores Ctrl-C, and a script cannot change that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def certificates(folder: Path, *names: str) -> None:
    certs.main(["init", "--out", f"{folder}/ca"])
    certs.main(["server", "--ca", f"{folder}/ca", "--host", "127.0.0.1", "--out", f"{folder}/server"])
    for name in names:
        certs.main(["client", "--ca", f"{folder}/ca", "--name", name, "--out", f"{folder}/{name}"])


class TestPython:
    @pytest.mark.filterwarnings("ignore:the two sides of a probe")
    def test_of_the_page_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Word for word but for the address and the size of the data; ModelCheckpoint knows its folder again."""
        monkeypatch.chdir(tmp_path)
        certificates(tmp_path / "certs", "lab-a")
        Path("clients.yaml").write_text("0: lab-a\n")
        for rounds in (1, 2):
            address, names = f"127.0.0.1:{free_port()}", dict[str, Any]()
            client = threading.Thread(target=take_part, args=(the_example(address), names), daemon=True)
            client.start()
            with suppress(KeyboardInterrupt):
                serve(address, rounds)
            client.join(timeout=60)
            assert names["said"] == "the run is over"

    def test_it_says_what_the_readme_says(self) -> None:
        text = (ROOT / "README.md").read_text()
        assert all(f"bash examples/remote/{script}" in text for script in ("server.sh", "clients.sh"))


def take_part(code: str, names: dict[str, Any]) -> None:
    try:
        exec(code, names)
    except BaseException as error:  # the server would wait for ever
        names["said"] = repr(error)
        _thread.interrupt_main()


def the_example(address: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "remote.md").read_text(), flags=re.DOTALL)
    assert code.count("fl.example.org:8470") == code.count('DocstringData(["numpy"])') == 1
    little = "batch_size=1, max_bytes_per_client=9000, validation_bytes_per_client=1500, test_bytes_per_client=1500"
    return code.replace("fl.example.org:8470", address).replace('(["numpy"])', f'(["numpy"], {little})')


def serve(address: str, rounds: int) -> None:
    lora = Lora(client=LoraHalf(target_modules=["q_proj", "v_proj"]), server=LoraHalf(target_modules="all-linear"))
    method = HOSFL(probes=1, client_optimizer=AdamW(lr=1e-3))
    trainer = Orchestrator(method, max_rounds=rounds, val_check_interval=1, enable_progress_bar=False)
    data = DocstringData(["peft"], max_bytes_per_client=9000, validation_bytes_per_client=1500,
                         test_bytes_per_client=1500)  # fmt: skip
    model = SplitCausalLM("tiny_lm", cut=3, lora=lora)
    trainer.serve(model, data, address, "certs/server", "clients.yaml", "mine", deadline=30.0)


class TestCommands:
    """`hosfl` takes them: in the containers, in the units, in the head of the recipes."""

    @pytest.mark.parametrize("name", ["server", "lab-a", "lab-b", "lab-c"])
    def test_of_the_containers(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        service = composed()["services"][name]
        understood(service["command"].replace("/hosfl/", f"{ROOT}/"), capsys)
        mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in service["volumes"]}
        assert mounted.keys() <= composed()["volumes"].keys()
        assert mounted == {f"{name}-certs": "/certs", f"{name}-state": "/state"}

    def test_certificates_of_the_containers(self, tmp_path: Path) -> None:
        """The script itself, in a folder in the place of the volumes."""
        [script] = composed()["services"]["certs"]["command"]
        (hosfl := tmp_path / "hosfl").write_text(COMMAND.format(python=sys.executable))
        hosfl.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": SOURCES}
        script = script.replace("/out/", f"{tmp_path}/out/").replace("$$", "$")
        for _ in range(2):  # the second time they are there
            subprocess.run(["sh", "-ec", script], env=environment, check=True, capture_output=True, timeout=60)
        sites = {path.parent.name for path in (tmp_path / "out").glob("*/site")}
        assert sites == {"server", "lab-a", "lab-b", "lab-c"}

    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
    def test_of_the_units(self, unit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        parsed = configparser.ConfigParser(interpolation=None)
        parsed.optionxform = str  # type: ignore[assignment,method-assign]
        parsed.read(unit)
        service = parsed["Service"]
        assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")
        program, _, command = service["ExecStart"].partition(" ")
        recipe = {"serve": "server.yaml", "join": "client.yaml"}[command.split()[0]]
        understood(command.replace(f"/etc/hosfl/{recipe}", f"{EXAMPLES}/{recipe}"), capsys)
        if shutil.which("systemd-analyze"):
            (copy := tmp_path / unit.name).write_text(unit.read_text().replace(program, "/bin/true"))
            done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=30)
            assert (done.returncode, done.stderr) == (0, "")

    def test_of_the_recipes(self, capsys: pytest.CaptureFixture[str]) -> None:
        commands = [
            line
            for path in (EXAMPLES / "server.yaml", EXAMPLES / "client.yaml")
            for line in re.findall(r"^hosfl .*$", path.read_text().replace("\\\n#", " ").replace("#     ", ""), re.M)
        ]
        assert [line.split()[1] for line in commands] == ["fit", "join"]
        for line in commands:
            understood(line.removeprefix("hosfl "), capsys)

    def test_the_two_recipes_agree(self) -> None:
        server, client = (
            yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["model"] for name in ("server", "client")
        )
        del server["init_args"]["optimizer"]
        assert server == client


def composed() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "compose.yaml").read_text())


def understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with command_line(), pytest.raises(SystemExit) as end:
        cli.main([*shlex.split(command), "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err
