"""Where a run and an evaluation write, and what they do not touch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.run import folder
from tests.random_tokens import RandomTokens
from tests.run.test_record import LENGTHS, Kit


def test_an_evaluation_makes_no_folder_and_leaves_its_metrics_in_the_run(kit: Kit, tmp_path: Path) -> None:
    trainer = kit.trainer(default_root_dir=str(tmp_path))
    metrics = (kit.folder / "metrics.csv").read_bytes()
    [told] = trainer.validate(kit.model(), RandomTokens(LENGTHS), str(kit.folder))
    assert json.loads((kit.folder / "validation.json").read_text()) == told
    assert (kit.folder / "metrics.csv").read_bytes() == metrics
    kit.trainer(default_root_dir=str(tmp_path)).validate(kit.model(), RandomTokens(LENGTHS))
    assert not list(tmp_path.iterdir())


def test_a_logger_that_is_given_is_written(kit: Kit, tmp_path: Path) -> None:
    trainer = kit.trainer(logger=CSVLogger(str(tmp_path), name=""))
    trainer.validate(kit.model(), RandomTokens(LENGTHS))
    assert (tmp_path / "version_0" / "metrics.csv").is_file()


def test_a_second_run_without_loggers_says_that_it_takes_the_place_of_the_first(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(folder, "rank_zero_info", said.append)
    without = {"logger": False, "default_root_dir": str(tmp_path)}
    kit.fit(trainer=without)
    assert not said
    kit.fit(trainer=without)
    assert said == [f"trainer.logger: false makes no folder for a run, so this one replaces the one in {tmp_path}"]


def test_a_run_that_goes_on_without_loggers_stays_in_its_folder(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = {"default_root_dir": str(tmp_path)}
    kit.fit(trainer=root)
    run = tmp_path / "version_0"
    again = kit.fit(trainer={**root, "logger": False, "max_rounds": 3}, ckpt_path=run)
    assert Path(again.log_dir) == run
    assert [one.name for one in tmp_path.iterdir()] == ["version_0"]
    assert json.loads((run / "summary.json").read_text())["rounds"] == 3
    capsys.readouterr()
    kit.fit(trainer={**root, "max_rounds": 3}, ckpt_path=run)
    assert "nothing left to do: 3 rounds are done, trainer.max_rounds is 3" in capsys.readouterr().out
