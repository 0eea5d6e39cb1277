"""A checkpoint and an update log of the code before the round became a conversation: see the README in `before`."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hosfl_lightning import HOSFL
from hosfl_lightning.aggregation import recorded
from hosfl_lightning.optim import AdamW
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import CatchUpRequest, Message, Update, encode
from tests.run.before.make import FOLDER, ROUNDS, data, model, state_of, trainer

BEFORE = Path(__file__).parent / "before"
#: Of moments and of scalars, which are of the size of 1/μ times the rounding of z.
TOLERANCE, COARSE = 1e-6, 1e-5


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run's folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(BEFORE / "run", FOLDER))


def kept(round: int) -> dict[str, Tensor]:
    """What was held after so many rounds."""
    states = load_file(BEFORE / "states.safetensors")
    return {name: tensor for name, tensor in states.items() if name.startswith(f"{round}/")}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close = COARSE if "/moments." in name else TOLERANCE
        torch.testing.assert_close(found[name], tensor, rtol=close, atol=close, msg=lambda m, n=name: f"{n}: {m}")


def records(log: ReplayLog) -> list[Update]:
    run_id = bytes.fromhex(log.starts[0]["run_id"])
    return [recorded(frame, run_id) for frame in log.frames()]


def plain(update: Update) -> dict[str, Any]:
    """What does not depend on the machine."""
    return {name: v for name, v in vars(update).items() if name not in ("coefficients", "incarnation")}


def test_the_run_goes_on_to_its_end(folder: Path, sent: list[tuple[Message, int]]) -> None:
    again, trained = trainer(), model()
    again.fit(trained, data(), ckpt_path=str(folder))
    assert again.global_step == ROUNDS
    assert again.log_dir == str(folder)
    assert_close(state_of(trained, again.endpoint.client.optimizer, ROUNDS), kept(ROUNDS))

    log = ReplayLog.read(folder / "updates.log")
    [request] = [message for message, _ in sent if isinstance(message, CatchUpRequest)]
    back = (request.round, request.client, request.version, request.incarnation)
    assert back == (3, 2, 1, log.starts[0]["incarnation"]), "who was away when the checkpoint was made"
    assert again.summary["catch_up"] == {"snapshot": 1}
    mine, theirs = records(log), records(ReplayLog.read(BEFORE / "whole.log"))
    assert [plain(update) for update in mine] == [plain(update) for update in theirs]
    for update, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(update.coefficients, other.coefficients, rtol=COARSE, atol=COARSE)

    rows, before = (
        list(csv.DictReader((path / "metrics.csv").read_text().splitlines())) for path in (folder, BEFORE / "run")
    )
    assert [row["round"] for row in rows] == ["0", "1", "2", "3", "4"]
    for row, old in zip(rows, before):
        assert {name: row[name] for name in old} == old


@pytest.mark.parametrize("round", range(1, ROUNDS + 1))
def test_the_clients_are_rebuilt_from_the_log(round: int) -> None:
    fresh, algorithm = model(), HOSFL(client_optimizer=AdamW())
    log = ReplayLog.read(BEFORE / "whole.log")
    optimizer = rebuild(fresh, algorithm.parameters(fresh), log, round, algorithm)
    assert optimizer.steps == round
    found = state_of(fresh, optimizer, round)
    expected = {name: tensor for name, tensor in kept(round).items() if "/server_half." not in name}
    assert_close({name: found[name] for name in found if "/server_half." not in name}, expected)
    assert {name.partition(".")[0] for name in expected} == {f"{round}/client_half", f"{round}/moments"}


def test_its_frames_are_those_that_are_written_today() -> None:
    log = ReplayLog.read(BEFORE / "whole.log")
    run_id = bytes.fromhex(log.starts[0]["run_id"])
    frames = [*log.frames()]
    assert len(frames) == ROUNDS
    assert [encode(update, run_id) for update in records(log)] == frames
