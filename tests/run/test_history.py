"""A server that died and came back on other hardware: what it voids, and what it tells the clients that are ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import Algorithm, SplitFedSGD
from hosfl_lightning.availability import Trace
from hosfl_lightning.clients.catch_up import client_state, same_state, sized_state
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.optim import SGD, AdamW, ZerothOrder
from hosfl_lightning.run import folder as run_folder
from hosfl_lightning.run import history
from hosfl_lightning.run.rebuild import rebuild
from hosfl_lightning.server import CatchUp
from hosfl_lightning.server.replay_log import ReplayLog, WitnessError
from hosfl_lightning.wire import (
    CatchUpRequest,
    Message,
    Multiplier,
    Snapshot,
    TooLargeError,
    decode,
    encode,
    encoded_size,
)
from tests.random_tokens import RandomTokens

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]


class TestAServerThatCameBackElsewhere:
    """It computes other bits than the one that died, from a checkpoint of before some of that one's updates."""

    #: Client 1 misses round 3, client 2 rounds 1 to 4, client 3 rounds 1 to 5, client 4 rounds 2 to 5.
    TRACE = Trace([[0, 1, 2, 3, 4], [0, 1, 4], [0, 1], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3, 4]])
    RETURNS: dict[str, Any] = {"availability": TRACE, "catch_up": CatchUp("replay")}

    class Saves(Callback):
        """A checkpoint after each of the first two rounds."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx < 2:
                trainer.save_checkpoint(f"{trainer.log_dir}/checkpoints/{batch_idx + 1}.ckpt")

    class OtherBits(HOSFL):
        class RoundsElsewhere(SplitEndpoint):
            def answer(self, multipliers: Sequence[Multiplier]) -> list[Message]:
                answers: list[Any] = super().answer(multipliers)
                return [replace(one, coefficients=one.coefficients * (1 + 2**-20)) for one in answers]

        endpoint = RoundsElsewhere

        @property
        def name(self) -> str:
            return "HOSFL"

    @pytest.fixture
    def five(self) -> RandomTokens:
        return RandomTokens([[5, 4]] * 5, batch_size=2)

    @pytest.fixture
    def died(self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, five: RandomTokens) -> Path:
        """The folder of a run that ended after round 5."""
        algorithm = HOSFL(client_optimizer=AdamW(lr=1e-2))
        trainer = make_orchestrator(algorithm, max_rounds=6, callbacks=[self.Saves()], **self.RETURNS)
        trainer.fit(make_model(), five)
        return Path(trainer.log_dir)

    class SavesAndDies(Callback):
        """After four rounds."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                trainer.save_checkpoint(f"{trainer.log_dir}/checkpoints/4.ckpt")

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                raise KeyboardInterrupt

    def go_on(
        self, make: MakeOrchestrator, model: SplitCausalLM, data: RandomTokens, path: Path, **settings: Any
    ) -> Orchestrator:
        algorithm = self.OtherBits(client_optimizer=AdamW(lr=1e-2))
        trainer = make(algorithm, **{"max_rounds": 7, **self.RETURNS, **settings})
        trainer.fit(model, data, ckpt_path=str(path))
        return trainer

    @pytest.mark.parametrize("dies_again", [False, True])
    def test_sends_a_snapshot_to_those_that_are_ahead_and_says_why(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, five: RandomTokens, died: Path,
        sent: list[tuple[Message, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        dies_again: bool,
    ) -> None:  # fmt: skip
        """Though it may die once more as soon as the log says that it is there."""
        monkeypatch.setattr(history, "hardware", lambda device: "another machine")
        old = [decode(frame, "update") for frame in ReplayLog.read(died / "updates.log").frames()]
        if dies_again:
            killed = patch.object(run_folder, "rewind", side_effect=KeyboardInterrupt)
            with killed, pytest.raises(KeyboardInterrupt):
                self.go_on(make_orchestrator, make_model(), five, died)
            assert not any(isinstance(m, Snapshot) for m, _ in sent)
        trained = make_model()
        trainer = self.go_on(make_orchestrator, trained, five, died)
        assert "The server came back on other hardware (another machine; before: torch" in capsys.readouterr().out

        log = ReplayLog.read(died / "updates.log")
        first, second = (start["incarnation"] for start in log.starts)
        assert [start["from_round"] for start in log.starts] == [0, 2]
        new = [decode(frame, "update") for frame in log.frames()]
        assert [u.incarnation for u in new] == [first] * 2 + [second] * 5  # type: ignore[union-attr]
        assert [encode(u) for u in new[:2]] == [encode(u) for u in old[:2]]
        assert not torch.equal(new[2].coefficients, old[2].coefficients)  # type: ignore[union-attr]

        requests = [m for m, _ in sent if isinstance(m, CatchUpRequest)]
        ahead = {(2, 0, 6, first), (2, 1, 6, first), (5, 2, 6, first)}
        behind = {(4, 1, 3, second), (6, 3, 1, first), (6, 4, 2, first)}
        assert {(m.round, m.client, m.version, m.incarnation) for m in requests} >= ahead | behind
        snapshots = [m for m, _ in sent if isinstance(m, Snapshot)]
        assert {(m.round, m.client) for m in snapshots} == {(2, 0), (2, 1), (5, 2)}
        assert snapshots[0].reason == (
            f"update 6 of server {first} is not in the history of {second}, which is at round 2"
        )
        assert trainer.summary["catch_up"] == {"replay": 3, "snapshot": 3}

        fresh = make_model()
        optimizer = rebuild(fresh, fresh.client_parameters, log, 7, HOSFL(client_optimizer=AdamW()))
        assert same_state(client_state(optimizer), client_state(trainer.endpoint.client.optimizer))

    def test_knows_who_has_come_back_since(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, five: RandomTokens, died: Path,
        sent: list[tuple[Message, int]], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(history, "hardware", lambda device: "another machine")
        with pytest.raises(KeyboardInterrupt):
            self.go_on(make_orchestrator, make_model(), five, died, callbacks=[self.SavesAndDies()])
        sent.clear()
        self.go_on(make_orchestrator, make_model(), five, died)
        assert [(m.round, m.client) for m, _ in sent if isinstance(m, Snapshot)] == [(5, 2)]

    def test_gets_a_name_of_its_own_wherever_it_goes_on(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, five: RandomTokens, died: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Back there from a checkpoint of the first machine, it voids some updates of either."""
        monkeypatch.setattr(history, "hardware", lambda device: "another machine")
        for checkpoint in (2, 1):
            self.go_on(make_orchestrator, make_model(), five, died / "checkpoints" / f"{checkpoint}.ckpt")
        starts = ReplayLog.read(died / "updates.log").starts
        assert [start["from_round"] for start in starts] == [0, 2, 1]
        assert [start["incarnation"].partition("-")[0] for start in starts] == ["0", "1", "2"]

    def test_with_other_bits_on_the_same_hardware_is_stopped(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, five: RandomTokens, died: Path
    ) -> None:
        with pytest.raises(WitnessError, match=r"round 2, executed again, differs from the update on record"):
            self.go_on(make_orchestrator, make_model(), five, died)
        assert len(ReplayLog.read(died / "updates.log").starts) == 1

    def test_knows_who_was_there_when_the_round_was_tried_again(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, sent: list[tuple[Message, int]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        class Retried(Trace):
            """Round 3 finds client 2 alone, and then the others."""

            def online(self, clients: int, seed: int, round: int, attempt: int = 0) -> list[int]:
                return [2] if round == 3 and not attempt else super().online(clients, seed, round)

        data = RandomTokens([[5, 4]] * 3, batch_size=2)
        settings: dict[str, Any] = {
            **self.RETURNS, "availability": Retried([[0, 1, 2], [0, 1], [0, 1], [0, 1]]),
            "min_clients": 2, "on_too_few": "repeat",
        }  # fmt: skip
        first = make_orchestrator(
            HOSFL(client_optimizer=AdamW(lr=1e-2)), max_rounds=4, callbacks=[self.Saves()], **settings
        )
        first.fit(make_model(), data)
        folder = Path(first.log_dir)
        updates = [decode(frame, "update") for frame in ReplayLog.read(folder / "updates.log").frames()]
        assert [update.attempt for update in updates] == [0, 0, 0, 1]  # type: ignore[union-attr]
        monkeypatch.setattr(history, "hardware", lambda device: "another machine")
        sent.clear()
        self.go_on(make_orchestrator, make_model(), data, folder, max_rounds=4, **settings)
        requests = [(m.round, m.client, m.version) for m, _ in sent if isinstance(m, CatchUpRequest)]
        assert requests[:3] == [(2, 0, 4), (2, 1, 4), (3, 2, 1)]


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        (
            SplitFedSGD(SGD(lr=0.1)),
            {},
            r"trainer\.replay_log: an update of this run has [\d,]+ bytes, over the limit of 2,0",
        ),
        (
            HOSFL(client_optimizer=AdamW()),
            {"availability": Trace([[0]])},
            r"trainer\.availability: a snapshot .* \(Always\)",
        ),
    ],
)
def test_what_no_message_could_hold_is_refused_before_the_first_round(
    make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm, settings: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(history, "LIMIT", 2000)
    trainer = make_orchestrator(algorithm, max_rounds=1, **settings)
    with pytest.raises(TooLargeError, match=message):
        trainer.fit(make_model(), data)
    assert not (Path(trainer.log_dir) / "updates.log").exists()
    make_orchestrator(max_rounds=1).fit(make_model(), data)  # small updates, and nobody leaves


def test_a_snapshots_size_is_known_before_the_first_step() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))]
    for rule in (SGD(), SGD(momentum=0.9), AdamW()):
        optimizer = ZerothOrder(parameters, rule)
        expected = encoded_size(Snapshot(0, 0, 0, "", "", 0, sized_state(optimizer)))
        optimizer.record(torch.ones(2))
        optimizer.step()
        assert encoded_size(Snapshot(0, 0, 0, "", "", 0, client_state(optimizer))) == expected
