"""``hosfl --help``: every command, at once."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from hosfl_lightning import cli
from hosfl_lightning.cli import COMMANDS
from hosfl_lightning.run.wandb_controls import control_loggers, join_group
from hosfl_lightning.usage import GROUPS, WIDTH, usage


def test_every_command_is_there() -> None:
    named = [name for commands in GROUPS.values() for name in commands]
    assert sorted(named) == sorted(COMMANDS)
    lines = usage().splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)
    assert max(map(len, lines)) <= WIDTH


def test_it_waits_for_no_library() -> None:
    code = "import sys; from hosfl_lightning.cli import main; main(['--help']); print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith(usage())
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(told.splitlines()[-1].split())


@pytest.mark.parametrize(("terminal", "rank", "says"), [(True, "0", True), (False, "0", False), (True, "1", False)])
def test_libraries_are_imported_without_the_collector_and_a_terminal_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool, rank: str, says: bool
) -> None:
    done: list[str] = []
    monkeypatch.delitem(sys.modules, "hosfl_lightning.recipe", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(cli, "import_module", lambda name: done.append(f"{name} {gc.isenabled()}"))
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    cli._libraries()
    assert done == ["hosfl_lightning.recipe False", "freeze"]
    assert gc.isenabled()
    assert ("loading" in capsys.readouterr().err) is says


def test_they_are_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hosfl_lightning.recipe", sys)
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("what a process has made since would stay for good"))
    cli._libraries()


def test_wandb_is_imported_by_those_alone_who_log_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    join_group([])
    with control_loggers([], "frozen", "HOSFL") as made:
        assert made == []
