"""A run that diverges says which half did, since when, what to lower, and what is left of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hosfl_lightning import HOSFL, Orchestrator, algorithms
from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.run.divergence import DivergedError
from hosfl_lightning.run.loop import MAX_ATTEMPTS
from tests.faults import count_writes
from tests.random_tokens import RandomTokens
from tests.run.test_record import LENGTHS, Kit, adam

CLIENT = "lower trainer.algorithm.init_args.client_optimizer.lr and begin anew"
SERVER = "lower model.init_args.optimizer.lr and begin anew"
pytestmark = pytest.mark.filterwarnings(
    "ignore:round .* is refused", "ignore:round .* half ", "ignore:Encountered `nan` values"
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with count_writes():
        yield Kit(tmp_path_factory.mktemp("kit"))


class Breaks(Callback):
    """Before a round, one weight of a half is no number: what a rate that is too high does at some time.

    The last update did it, so the checkpoint of before is sound.
    """

    def __init__(self, half: str, round: int, value: float = torch.nan) -> None:
        self.half, self.round, self.value = half, round, value

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.round:
            next(iter(getattr(pl_module, f"{self.half}_parameters").values())).data.view(-1)[0] = self.value


def fit(kit: Kit, algorithm: Any = None, *callbacks: Callback, model: Any = None, **settings: Any) -> Orchestrator:
    kept = ModelCheckpoint(filename="{step}", save_top_k=-1)
    trainer = Orchestrator(
        algorithm or HOSFL(), callbacks=[*callbacks, kept], default_root_dir=str(kit.root / "runs"),
        enable_progress_bar=False, **{"max_rounds": 5, "clients_per_round": 2, "val_check_interval": 1} | settings,
    )  # fmt: skip
    kit.last = trainer  # type: ignore[attr-defined]
    trainer.fit(kit.model(**{"lr_scheduler": None} | (model or {})), RandomTokens(LENGTHS))
    return trainer


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("name", ["HOSFL", "SplitFedV2", "CSEFSL", "HERONSFL", "ZOSFL"])
def test_a_clients_rate_that_is_too_high(kit: Kit, name: str, simulation: str) -> None:
    method = getattr(algorithms, name)(client_optimizer=SGD(lr=1e30))
    if simulation == "batched" and not method.joint:
        simulation = "per_client"
    with pytest.raises(
        DivergedError, match=r"round 1: the client half .* since the update of round 0 \(client \d: "
    ) as told:
        fit(kit, method, simulation=simulation)
    assert CLIENT in str(told.value)
    assert "min_clients" not in str(told.value)
    assert not (Path(kit.last.log_dir) / "checkpoints" / "stopped.ckpt").exists(), "nothing to go on from"


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("algorithm", [HOSFL(), algorithms.Frozen()], ids=["HOSFL", "Frozen"])
def test_a_server_half_that_is_no_number(kit: Kit, algorithm: Any, simulation: str) -> None:
    with pytest.raises(DivergedError, match=r"round 2: the server half .* since the update of round 1") as told:
        fit(kit, algorithm, Breaks("server", 2), simulation=simulation)
    assert SERVER in str(told.value)


def test_the_servers_rate_of_a_method_without_backprop(kit: Kit) -> None:
    with pytest.raises(
        DivergedError, match=r"lower trainer\.algorithm\.init_args\.server_optimizer\.lr and begin anew"
    ):
        fit(kit, algorithms.ZOSFL(), Breaks("server", 2))


def test_the_last_sound_checkpoint_is_named_and_can_be_used(kit: Kit) -> None:
    with pytest.raises(DivergedError, match="the last sound checkpoint is") as told:
        fit(kit, None, Breaks("client", 3))
    found = re.search(r"checkpoint is (\S+) \(round (\d); hosfl validate, test and export take it\)", str(told.value))
    assert found is not None
    assert (Path(found[1]).name, found[2]) == ("step=2.ckpt", "2")
    assert kit.trainer(logger=False).validate(kit.model(), RandomTokens(LENGTHS), found[1])
    with pytest.raises(DivergedError, match="no checkpoint of before is kept"):
        fit(kit, None, Breaks("client", 0))


@pytest.mark.parametrize(("value", "attempts"), [(torch.nan, 1), (1e30, MAX_ATTEMPTS)])
def test_repeating_a_round_does_not_mend_a_half(
    kit: Kit, value: float, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    original = Orchestrator.sample

    def sample(self: Orchestrator, round: int, attempt: int = 0) -> list[int]:
        asked.append((round, attempt))
        return original(self, round, attempt)

    monkeypatch.setattr(Orchestrator, "sample", sample)
    with pytest.raises(DivergedError):
        fit(kit, None, Breaks("client", 1, value), on_too_few="repeat")
    assert len({attempt for round, attempt in asked if round == 1}) == attempts


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("rate", [10.0, 1e15])
def test_a_servers_rate_that_is_too_high(kit: Kit, rate: float, simulation: str) -> None:
    told = rf"the server half .* since .* {re.escape(SERVER.removesuffix(' and begin anew'))}"
    with pytest.warns(match=told) if rate < 1e15 else pytest.raises(DivergedError, match=told):
        fit(kit, None, model={"optimizer": adam(rate)}, max_rounds=5, simulation=simulation)


@pytest.mark.parametrize("half", ["client", "server"])
def test_answers_that_overflow_are_blamed_on_the_half_that_has_grown(kit: Kit, half: str) -> None:
    class Grows(RoundCallback):
        def on_answers(self, answers: Any) -> Any:
            if self.trainer.global_step < 2:
                return answers
            for p in getattr(self.trainer.lightning_module, f"{half}_parameters").values():
                p.data.fill_(1e6)
            return [replace(answer, coefficients=answer.coefficients + 1e12) for answer in answers]

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.trainer = trainer

    with pytest.raises(DivergedError, match=f"round 2: the {half} half .* beyond .*-fold since the start") as told:
        fit(kit, HOSFL(), Grows())
    assert (CLIENT if half == "client" else SERVER) in str(told.value)


@pytest.mark.parametrize("rate", [30.0])
def test_a_client_that_has_run_away_is_told_of(kit: Kit, rate: float) -> None:
    with pytest.warns(match=r"the client half has grown .*lower trainer\.algorithm\.init_args\.client_optimizer\.lr"):
        fit(kit, HOSFL(client_optimizer=AdamW(lr=rate)), max_rounds=3)
