"""Lightning's own callbacks in a run: each works, or is refused with what to set instead."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import callbacks as stock
from lightning.pytorch.callbacks import Callback

from hosfl_lightning import Orchestrator
from hosfl_lightning.run.folder import find
from hosfl_lightning.run.hooks import HookError
from hosfl_lightning.run.stock_callbacks import REFUSED
from tests.faults import count_writes
from tests.random_tokens import RandomTokens
from tests.run.test_record import LENGTHS, Kit

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"


class Writer(stock.BasePredictionWriter):
    pass


class Tuner(stock.BaseFinetuning):
    pass


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    with count_writes():
        yield Kit(tmp_path_factory.mktemp("kit"))


def files(trainer: Orchestrator) -> list[str]:
    folder = Path(trainer.log_dir) / "checkpoints"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))


def rows(trainer: Orchestrator) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stock.ModelCheckpoint(every_n_epochs=5), "every_n_epochs=5) would never .* set every_n_train_steps"),
        (lambda: stock.ModelCheckpoint(save_on_train_epoch_end=True), "save_on_train_epoch_end=True) would save once"),
        (lambda: stock.ModelCheckpoint(save_on_exception=True), "would save the middle of a round; leave it out"),
        (lambda: stock.ModelCheckpoint(filename="a-{epoch:02d}"), r"{epoch} is always 0; take {round} or {step}"),
        (lambda: stock.EarlyStopping("val/loss", check_on_train_epoch_end=True), "would look once, .* leave it out"),
        (lambda: stock.EarlyStopping("train/loss"), "the first is before there is a round; monitor .* val/loss"),
        (lambda: stock.LearningRateMonitor("epoch"), "would log once, .* set logging_interval to step"),
        (lambda: stock.Timer("00:01:00:00", interval="epoch"), "would look once, .* set interval to step"),
        (Tuner, "say it in model.init_args"),
        (stock.BackboneFinetuning, "say it in model.init_args"),
        (lambda: Writer("epoch"), "hosfl predict writes"),
        (stock.BatchSizeFinder, "set data.init_args.batch_size"),
        (lambda: stock.GradientAccumulationScheduler({0: 2}), "set data.init_args.batch_size or"),
        (stock.LearningRateFinder, "hosfl compare searches a grid"),
        (lambda: stock.ModelPruning("l1_unstructured", amount=0.1), "clients would not be told which"),
        (lambda: stock.StochasticWeightAveraging(1e-2), "clients would not hold the average"),
        (stock.WeightAveraging, "clients would not hold the average"),
        (stock.EMAWeightAveraging, "clients would not hold the average"),
        (lambda: stock.ThroughputMonitor(batch_size_fn=len), "time/round_seconds"),
        (lambda: stock.OnExceptionCheckpoint("."), "would save the middle of a round; leave it out"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_or_harm_is_refused(make: Callable[[], Callback], message: str) -> None:
    callback = make()
    pattern = "trainer.callbacks: " + type(callback).__name__ + ".*" + re.escape(message).replace(r"\ \.\*\ ", " .* ")
    pattern = pattern.replace(r",\ .*", ", .*")
    with pytest.raises(ValueError, match=pattern) as refused:
        Orchestrator(callbacks=[callback], logger=False)
    assert "\n" not in str(refused.value)


def test_files_are_named_by_rounds(kit: Kit) -> None:
    every = kit.trainer(callbacks=[stock.ModelCheckpoint(filename="{round}", save_top_k=-1, every_n_train_steps=1)])
    every.fit(kit.model(), RandomTokens(LENGTHS))
    assert files(every) == ["round=1.ckpt", "round=2.ckpt"]
    named = stock.ModelCheckpoint(filename="{round}-{val/loss:.1f}", save_top_k=-1)
    nested = kit.trainer(callbacks=[named], val_check_interval=1)
    nested.fit(kit.model(), RandomTokens(LENGTHS))
    assert [re.sub(r"\d\.\d", "x", name) for name in files(nested)] == [f"round={k}-val/loss=x.ckpt" for k in (1, 2)]
    assert find(nested.log_dir).round == 2
    first = find(str(Path(nested.log_dir) / "checkpoints" / files(nested)[0]))
    assert (first.round, first.folder, len(first.later)) == (1, Path(nested.log_dir).absolute(), 1)


def test_the_defaults_and_a_time_save_at_validations_and_rounds(kit: Kit) -> None:
    trainer = kit.trainer(callbacks=[stock.ModelCheckpoint(train_time_interval=timedelta(seconds=0))])
    trainer.fit(kit.model(), RandomTokens(LENGTHS))
    assert files(trainer) == ["epoch=0-step=2.ckpt"]
    trainer = kit.trainer(callbacks=[stock.ModelCheckpoint(save_top_k=-1)], val_check_interval=1)
    trainer.fit(kit.model(), RandomTokens(LENGTHS))
    assert files(trainer) == [f"epoch=0-step={k}.ckpt" for k in (1, 2)]


@pytest.mark.parametrize("strict", [True, False])
def test_early_stopping_looks_at_every_validation(kit: Kit, strict: bool) -> None:
    monitor = "val/loss" if strict else "train/loss"
    stops = stock.EarlyStopping(monitor, patience=1, min_delta=10.0, strict=strict)
    trainer = kit.trainer(callbacks=[stops], val_check_interval=1, max_rounds=4)
    trainer.fit(kit.model(), RandomTokens(LENGTHS))
    assert trainer.global_step == (1 if strict else 2), "of the first validation train/loss is unknown"


def test_a_timer_stops_between_rounds(kit: Kit) -> None:
    trainer = kit.trainer(callbacks=[stock.Timer(timedelta(seconds=0), verbose=False)], max_rounds=3)
    trainer.fit(kit.model(), RandomTokens(LENGTHS))
    assert trainer.global_step < 3


def test_monitors_log_every_round(kit: Kit) -> None:
    monitors = [stock.LearningRateMonitor("step"), stock.DeviceStatsMonitor(cpu_stats=True)]
    trainer = kit.trainer(callbacks=monitors)
    trainer.fit(kit.model(), RandomTokens(LENGTHS))
    found = rows(trainer)
    assert [row["lr-AdamW"] for row in found if row["lr-AdamW"]] == ["0.01", "0.005"]
    assert any(name.startswith("DeviceStatsMonitor.on_train_batch_end") for name in found[0])


@pytest.mark.parametrize(
    "make",
    [stock.ModelSummary, stock.RichModelSummary, stock.TQDMProgressBar, stock.RichProgressBar, stock.SpikeDetection,
     lambda: stock.LearningRateMonitor(None)],
)  # fmt: skip
def test_the_others_run(kit: Kit, make: Callable[[], Callback], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = kit.trainer(callbacks=[make()])
    trainer.fit(kit.model(), RandomTokens(LENGTHS))
    assert trainer.global_step == 2


def test_a_lambda_is_called_once_a_run_or_refused(kit: Kit) -> None:
    called: list[str] = []

    def note(*_: Any) -> None:
        called.append("end")

    kit.trainer(callbacks=[stock.LambdaCallback(on_train_epoch_end=note)]).fit(kit.model(), RandomTokens(LENGTHS))
    assert called == ["end"]
    with pytest.raises(HookError, match="LambdaCallback overrides on_sanity_check_start, which the Orchestrator never"):
        kit.trainer(callbacks=[stock.LambdaCallback(on_sanity_check_start=note)]).fit(
            kit.model(), RandomTokens(LENGTHS)
        )


def test_the_page_names_every_one() -> None:
    table = PAGE.read_text().partition("## Lightning's own")[2].partition("## What is logged")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    for name in stock.__all__:
        [line] = [line for line in lines if f"`{name}`" in line.split("|")[1]]
        refused = any(issubclass(getattr(stock, name), kind) for kind in REFUSED)
        assert ("refused" in line.split("|")[2]) == refused, name
