"""What crosses is kept as it was sent, within limits, and read back strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hosfl_lightning.callbacks import KeepMessages
from hosfl_lightning.callbacks.keep_messages import FOLDER, KeptError, kept_rounds
from hosfl_lightning.files import write_whole
from hosfl_lightning.fleet import Channel
from hosfl_lightning.wire import Message, StepRequest, encode
from tests.random_tokens import RandomTokens


@pytest.mark.parametrize("simulation", ["per_client", "batched"])
def test_keeps_the_first_rounds_as_they_were_sent(
    simulation: str, make_model: Callable[..., Any], make_orchestrator: Callable[..., Any], data: RandomTokens,
    sent: list[tuple[Message, int]],
) -> None:  # fmt: skip
    trainer = make_orchestrator(simulation=simulation, callbacks=[KeepMessages(rounds=2)])
    trainer.fit(make_model(), data)
    run = Path(trainer.log_dir)
    rounds = dict(kept_rounds(run, trainer.fleet.channel.run_id))
    assert list(rounds) == [0, 1]
    assert {(one.direction, one.message.kind) for one in rounds[0]} == {
        ("down", "step_request"), ("up", "smashed_data"), ("down", "multiplier"), ("up", "projected_gradients"),
        ("down", "update"),
    }  # fmt: skip
    kept = [encode(one.message) for held in rounds.values() for one in held]
    assert kept == [encode(message) for message, _ in sent if message.round < 2]
    assert (run / FOLDER / "round_000000.0.frames").stat().st_mode & 0o77 == 0


def test_stops_at_a_limit_with_a_word(
    make_model: Callable[..., Any], make_orchestrator: Callable[..., Any], data: RandomTokens, capsys: Any
) -> None:
    trainer = make_orchestrator(callbacks=[KeepMessages(rounds=3, max_bytes=40_000)])
    trainer.fit(make_model(), data)
    files = sorted((Path(trainer.log_dir) / FOLDER).iterdir())
    assert len(files) == 1 and sum(file.stat().st_size for file in files) <= 40_000
    assert "round 1 goes over max_bytes=40,000" in capsys.readouterr().out
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(KeptError, match="there is no message of this run"):
        list(kept_rounds(Path(trainer.log_dir)))


def test_a_run_that_goes_on_keeps_what_is_before_it(tmp_path: Path) -> None:
    for number in (0, 1, 2):
        write_whole(tmp_path / FOLDER / f"round_{number:06d}.0.frames", lambda file: file.write(b"x" * 60))
    channel, keeper = Channel(serialize=False), KeepMessages(rounds=3, max_bytes=220)
    trainer = SimpleNamespace(log_dir=tmp_path, global_rank=0, global_step=1, fleet=SimpleNamespace(channel=channel))
    keeper.on_train_start(trainer, None)
    assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["round_000000.0.frames"]
    channel.down(StepRequest(1, 0))  # with the round before it beyond the limit
    keeper.on_train_batch_end(trainer, None, None, None, 1)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_without_messages_says_how_to_keep_them(tmp_path: Path) -> None:
    with pytest.raises(KeptError, match=r"class_path: hosfl_lightning\.callbacks\.KeepMessages"):
        list(kept_rounds(tmp_path))
