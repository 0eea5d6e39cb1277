"""Runs in two processes leave what runs in one leave, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hosfl_lightning import Orchestrator, SplitCausalLM, recipe
from hosfl_lightning.fleet import Processes, RankProcesses
from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.run.checkpoint import load
from hosfl_lightning.run.folder import agree
from tests.conftest import RandomTokens
from tests.fleet.test_processes import TwoProcesses
from tests.fleet.two_ranks import CASES, COMPARED, left, run
from tests.recipe_runs import QUICKSTART, ROOT, SOURCES, hosfl, small

#: Without a second thread, and with this tree's package.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCES}
TIMEOUT = 300

pytestmark = [
    pytest.mark.filterwarnings("ignore:the two sides of a probe"),  # μ is large on purpose, see `CASES`
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),  # a run that goes on in its folder
]


@dataclass
class Runs:
    """The cases in ``one`` process and in ``two``, and what was said."""

    root: Path
    warned: list[str]
    code: int
    errors: str

    def folder(self, place: str, name: str) -> Path:
        return self.root / place / name / "version_0"

    def said(self, rank: int) -> str:
        return (self.root / "two" / f"said_{rank}.txt").read_text()


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("ranks")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in CASES:
            run(name, tiny_folder, root / "one", simulation="per_client")
        run("away", tiny_folder, root / "joint", simulation="batched")
    command = [sys.executable, "-m", "tests.fleet.two_ranks", str(tiny_folder), str(root / "two")]
    ended = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True, check=False
    )
    refusals = [text for w in caught if "is refused" in (text := str(w.message))]
    assert (root / "two" / "held_1.json").exists(), ended.stderr
    run("whole", tiny_folder, root / "one", root / "two" / "half" / "version_0", simulation="per_client")
    return Runs(root, refusals, ended.returncode, ended.stderr)


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_leave_what_one_leaves(runs: Runs, name: str) -> None:
    one, two = left(runs.folder("one", name)), left(runs.folder("two", name))
    assert [key for key in one if one[key] != two.get(key)] == []
    assert one.keys() == two.keys()


def test_a_joint_batch_ends_at_the_same_place_to_rounding(runs: Runs) -> None:
    joint, two = (load(runs.folder(place, "away") / "checkpoints" / "last.ckpt") for place in ("joint", "two"))
    for name, tensor in joint["state_dict"].items():
        torch.testing.assert_close(tensor, two["state_dict"][name], rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("place", ["one", "two"], ids=["from one process to two", "from two processes to one"])
def test_a_run_goes_on_in_another_number_of_processes(runs: Runs, place: str) -> None:
    """The second half of each was run in the other place."""
    whole, halves = left(runs.folder("one", "whole")), left(runs.folder(place, "half"))
    assert [key for key in whole if whole[key] != halves.get(key)] == []


def test_all_processes_end_with_the_same_bits_and_counts(runs: Runs) -> None:
    first, second = (json.loads((runs.root / "two" / f"held_{rank}.json").read_text()) for rank in (0, 1))
    assert [*first] == [*COMPARED, "half"]
    assert [name for name in first if first[name] != second[name]] == []


def test_a_refused_client_is_named_once_wherever_it_runs(runs: Runs) -> None:
    assert len(runs.warned) == 5
    assert [text for text in runs.warned if runs.said(0).count(text) != 1] == []
    summary = json.loads((runs.folder("two", "poisoned") / "summary.json").read_text())
    assert summary["refused"] == {"0": 2, "1": 2, "2": 1}


def test_only_the_first_process_speaks(runs: Runs) -> None:
    assert runs.said(1) == ""
    assert runs.said(0).count("run folder") == len(CASES)  # "failing" has none
    assert "rounds: 100%" in runs.said(0)


def test_all_processes_end_when_one_fails(runs: Runs) -> None:
    assert runs.code != 0
    assert "ValueError: the second process ends here" in runs.errors
    assert "LostProcessError: another process of this run has ended" in runs.errors


def test_a_bad_setting_is_found_before_another_process_starts(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trainer = make_orchestrator(devices=2, clients_per_round=9)
    monkeypatch.setattr(trainer.fabric, "launch", lambda: pytest.fail("launched"))
    with pytest.raises(ValueError, match="clients_per_round is 9"):
        trainer.fit(make_model(), data)


@pytest.mark.parametrize("devices", [0, "auto", True])
def test_devices_are_counted(make_orchestrator: Callable[..., Orchestrator], devices: Any) -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices must be a number"):
        make_orchestrator(devices=devices)


def test_a_joint_batch_is_refused_in_several_processes(make_orchestrator: Callable[..., Orchestrator]) -> None:
    with pytest.raises(ValueError, match="simulation=batched is one batch in one process"):
        make_orchestrator(devices=2, simulation="batched")


@pytest.mark.parametrize("decisions", [(False, False), (True, False), (True, True)])
def test_what_all_or_any_processes_decide(
    make_orchestrator: Callable[..., Orchestrator], decisions: tuple[bool, bool]
) -> None:
    mine, others = decisions
    trainer = make_orchestrator()
    trainer.processes = TwoProcesses(others)
    assert trainer.strategy.reduce_boolean_decision(mine) is all(decisions)
    assert trainer.strategy.reduce_boolean_decision(mine, all=False) is any(decisions)


def test_what_one_process_tells_the_others(make_orchestrator: Callable[..., Orchestrator]) -> None:
    """Plain values, so that Lightning's own broadcast, which pickles, is not needed."""
    trainer = make_orchestrator()
    trainer.processes = TwoProcesses("theirs")
    assert trainer.strategy.broadcast("mine") == "mine"
    assert trainer.strategy.broadcast("mine", src=1) == "theirs"


@pytest.mark.parametrize("lengths", [(0, 0), (3, 0), (2, 1 << 20)])
def test_bytes_of_any_length_are_exchanged(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int]) -> None:
    mine, theirs = (bytes([7 + n]) * length for n, length in enumerate(lengths))
    ranks = RankProcesses(cast(Any, None))
    gathered = iter([torch.tensor(len(theirs)), torch.tensor([*theirs.ljust(max(1, *lengths))], dtype=torch.uint8)])
    monkeypatch.setattr(ranks, "gather", lambda tensor: [tensor, next(gathered)])
    assert ranks._exchange(mine) == [mine, theirs]


def test_all_processes_name_the_folder_of_the_first(tmp_path: Path) -> None:
    class Second(Processes):
        def share(self, value: Any) -> list[Any]:
            return [4, value]

    (tmp_path / "version_7").mkdir()
    logger = CSVLogger(str(tmp_path), name="")
    agree([logger], Second())
    assert logger.log_dir == str(tmp_path / "version_4")


def test_an_error_names_its_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, line in ((0, "hosfl: error: bad\n"), (1, "hosfl: error in process 1: bad\n")):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        with pytest.raises(SystemExit):
            recipe.fail("bad")
        assert capsys.readouterr().err == line


@pytest.mark.parametrize("after", [recipe.HOSFLCommand.after_validate, recipe.HOSFLCommand.after_predict])
def test_only_the_first_process_tells_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], after: Callable[[Any], None]
) -> None:
    for first in (False, True):
        trainer = SimpleNamespace(
            is_global_zero=first, log_dir=str(tmp_path), callback_metrics={"val/loss": 1.0}, predictions=[]
        )
        after(SimpleNamespace(trainer=trainer))
        assert bool(capsys.readouterr().out) is first


def test_the_command_line_starts_the_other_process(tmp_path: Path) -> None:
    arguments = ["fit", f"--config={QUICKSTART}", *small(QUICKSTART, tmp_path), "--trainer.controls=[]"]
    one, two = ([*arguments, f"--trainer.default_root_dir={tmp_path / place}"] for place in ("one", "two"))
    hosfl(*one, "--trainer.simulation=per_client")
    script = shutil.which("hosfl", path=str(Path(sys.executable).parent))
    assert script is not None, "the package is not installed"
    ended = subprocess.run(
        [script, *two, "--trainer.devices=2"],
        cwd=ROOT, env=ENVIRONMENT, timeout=TIMEOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("run folder") == 1
    assert "args parameter" not in ended.stderr  # LightningCLI's warning
    alone, spread = (left(tmp_path / place / "version_0") for place in ("one", "two"))
    assert [key for key in alone if alone[key] != spread.get(key)] == []
