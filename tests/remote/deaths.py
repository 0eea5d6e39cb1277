"""Where a server ends in the middle of a round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from hosfl_lightning.callbacks.round_callback import RoundCallback

STAGES = ("begin", "multipliers", "answers", "update", "before_step", "end")


class DieAt(RoundCallback):
    """Ends the process at a stage of a round."""

    def __init__(self, round: int, stage: str, kill: Callable[[], None]) -> None:
        assert stage in STAGES
        self.round, self.stage, self.kill = round, stage, kill
        self.now = -1

    @property
    def state_key(self) -> str:
        return f"DieAt{self.round}{self.stage}"

    def at(self, stage: str) -> None:
        if self.now == self.round and stage == self.stage:
            self.kill()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.now = batch_idx
        self.at("begin")

    def on_multipliers(self, inbox: Any, multipliers: Any) -> None:
        self.at("multipliers")

    def on_answers(self, answers: list[Any]) -> list[Any]:
        self.at("answers")
        return answers

    def on_update(self, update: Any) -> None:
        self.at("update")

    def before_step(self) -> None:
        self.at("before_step")

    def report(self, trainer: Any, pl_module: Any) -> None:
        self.at("end")


class StopAt(Callback):
    """Ends the run after the round in which a file appears."""

    def __init__(self, flag: str) -> None:
        self.flag = Path(flag)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.flag.exists():
            trainer.should_stop = True
