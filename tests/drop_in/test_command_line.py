"""The project of `cli_project`, run by its command line; four lines of YAML are all that is added."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.drop_in import cli_project
from tests.drop_in.side_by_side import (
    CLIENT_KEYS,
    QUIET_WARNINGS,
    ZEROTH_ORDER_KEYS,
    Outcome,
    assert_learns,
    assert_only_added,
)

pytestmark = QUIET_WARNINGS
HYBRID_ORDER = """\
  - class_path: hosfl_lightning.callbacks.HybridOrder
    init_args:
      cut: net.2
      probes: 4
      rule: {class_path: hosfl_lightning.optim.SGD, init_args: {lr: LR}}
"""
ZEROTH_ORDER = """\
  - class_path: hosfl_lightning.callbacks.ZerothOrderTraining
    init_args:
      probes: 4
      rule: {class_path: hosfl_lightning.optim.SGD, init_args: {lr: LR}}
"""


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, added: str = "", *args: str) -> Outcome:
    folder.mkdir()
    (folder / "config.yaml").write_text(cli_project.CONFIG + added)
    return command(folder, monkeypatch, "fit", "--config", "config.yaml", *args)


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> Outcome:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what jsonargparse renamed
    return Outcome(cli_project.main().trainer)


@pytest.mark.parametrize(
    ("added", "lr", "keys"),
    [(HYBRID_ORDER, "0.4", CLIENT_KEYS), (ZEROTH_ORDER, "0.05", ZEROTH_ORDER_KEYS)],
    ids=["hybrid", "zeroth"],
)
def test_lines_of_yaml_are_all(
    added: str, lr: str, keys: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(tmp_path / "plain", monkeypatch)
    ours = run(tmp_path / "ours", monkeypatch, added.replace("LR", lr))
    frozen = run(tmp_path / "frozen", monkeypatch, added.replace("LR", "0.0"))
    assert_only_added(plain, ours, keys)
    assert ours.module.hparams.num_classes == 3
    assert_learns(ours, frozen, margin=0.02)


def test_the_saved_config_runs_again_and_takes_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = HYBRID_ORDER.replace("LR", "0.2")
    first = run(tmp_path / "first", monkeypatch, added, "--trainer.max_steps=4", "--project.name=again")
    saved = next((tmp_path / "first").rglob("version_0/config.yaml"))
    again = command(tmp_path, monkeypatch, "fit", f"--config={saved}", "--data.batch_size=8")
    assert again.module.hparams.run_name == "again"
    assert again.seen.losses == first.seen.losses
    assert again.checkpoint["callbacks"]["HybridOrder"]["rule"] == "SGD"
