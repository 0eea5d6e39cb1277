"""A server that died and came back on other hardware: what it voids, and what it tells the clients that are ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM, history
from hosfl_lightning.availability import Trace
from hosfl_lightning.catch_up import CatchUp, client_state, same_state
from hosfl_lightning.optim import AdamW
from hosfl_lightning.rebuild import rebuild
from hosfl_lightning.replay import ReplayLog, WitnessError
from hosfl_lightning.transport import InProcess
from hosfl_lightning.wire import CatchUpRequest, Snapshot, decode, encode
from tests.conftest import RandomTokens

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages of clients that return."""
    kept: list[Any] = []
    send = InProcess._send

    def keeping(self: InProcess, message: Any, direction: str, receivers: int) -> Any:
        kept.append(message)
        return send(self, message, direction, receivers)

    monkeypatch.setattr(InProcess, "_send", keeping)
    return kept


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
        def answer(self, *args: Any) -> Tensor:
            return super().answer(*args) * (1 + 2**-20)

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

    def go_on(self, make: MakeOrchestrator, model: SplitCausalLM, data: RandomTokens, path: Path) -> Orchestrator:
        algorithm = self.OtherBits(client_optimizer=AdamW(lr=1e-2))
        trainer = make(algorithm, max_rounds=7, **self.RETURNS)
        trainer.fit(model, data, ckpt_path=str(path))
        return trainer

    def test_sends_a_snapshot_to_those_that_are_ahead_and_says_why(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, five: RandomTokens, died: Path,
        sent: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.setattr(history, "hardware", lambda device: "another machine")
        old = [decode(frame, "update") for frame in ReplayLog.read(died / "updates.log").frames()]
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

        requests = [m for m in sent if isinstance(m, CatchUpRequest)]
        ahead = {(2, 0, 6, first), (2, 1, 6, first), (5, 2, 6, first)}
        behind = {(4, 1, 3, second), (6, 3, 1, first), (6, 4, 2, first)}
        assert {(m.round, m.client, m.version, m.incarnation) for m in requests} >= ahead | behind
        snapshots = [m for m in sent if isinstance(m, Snapshot)]
        assert {(m.round, m.client) for m in snapshots} == {(2, 0), (2, 1), (5, 2)}
        assert snapshots[0].reason == (
            f"update 6 of server {first} is not in the history of {second}, which is at round 2"
        )
        assert trainer.summary["catch_up"] == {"replay": 3, "snapshot": 3}

        optimizer = rebuild(make_model(), log, 7, AdamW())
        assert same_state(client_state(optimizer), client_state(trainer.algorithm.client.optimizer))

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
