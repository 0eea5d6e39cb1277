"""A checkpoint and an update log of earlier code, whose rules were others: see the README in `before`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hosfl_lightning import HOSFL
from hosfl_lightning.aggregation import recorded
from hosfl_lightning.optim import AdamW
from hosfl_lightning.run.rebuild import RebuildError, rebuild
from hosfl_lightning.server.replay_log import OtherRunError, ReplayLog
from hosfl_lightning.wire import PROTOCOL, encode
from tests.run.before.make import FOLDER, ROUNDS, data, model, trainer
from tests.wire.samples import reseal

BEFORE = Path(__file__).parent / "before"
WORDS = r"updates.log: its updates move weights by the rules before hosfl-rules/1, this version by hosfl-rules/1"


def test_the_run_is_not_gone_on_with_by_other_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(BEFORE / "run", FOLDER))
    with pytest.raises(OtherRunError, match=WORDS + r".*version that wrote it, or start a new run"):
        trainer().fit(model(), data(), ckpt_path=str(folder))
    assert (folder / "updates.log").read_bytes() == (BEFORE / "run" / "updates.log").read_bytes()


def test_its_clients_are_not_rebuilt_by_other_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fresh, algorithm = model(), HOSFL(client_optimizer=AdamW())
    log = ReplayLog.read(BEFORE / "run" / "updates.log")
    with pytest.raises(RebuildError, match=WORDS + r".*replay it with the version that wrote it"):
        rebuild(fresh, algorithm.parameters(fresh), log, 1, algorithm)


def test_its_frames_are_those_that_are_written_today() -> None:
    log = ReplayLog.read(BEFORE / "run" / "updates.log")
    run_id = bytes.fromhex(log.starts[0]["run_id"])
    frames = [*log.frames()]
    assert len(frames) == ROUNDS
    today = [reseal(frame[:4] + bytes([PROTOCOL]) + frame[5:]) for frame in frames]
    assert [encode(recorded(frame, run_id), run_id) for frame in today] == today
