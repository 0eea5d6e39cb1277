"""Lightning's own callbacks in a run, which is one epoch of many rounds: what would do nothing or harm is refused."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks as stock
from lightning.pytorch.callbacks import Callback

#: Those that cannot run here, and what does instead.
REFUSED: dict[type[Callback], str] = {
    stock.BaseFinetuning: "a run trains from its first round what it trains; say it in model.init_args (lora, side, "
    "frozen), and train each phase by a run of its own",
    stock.BasePredictionWriter: "hosfl predict writes predictions.jsonl, and Orchestrator.predict returns them",
    stock.BatchSizeFinder: "it tries batches in a plain Trainer's loop; set data.init_args.batch_size",
    stock.GradientAccumulationScheduler: "the server takes one step a round; set data.init_args.batch_size or "
    "trainer.clients_per_round",
    stock.LearningRateFinder: "it tries rates in a plain Trainer's loop; hosfl compare searches a grid of them",
    stock.ModelPruning: "clients would not be told which of their weights are pruned; prune before the run, or after "
    "it what hosfl export wrote",
    stock.StochasticWeightAveraging: "it averages over epochs, and clients would not hold the average; lower the "
    "server's rate by model.init_args.lr_scheduler",
    stock.ThroughputMonitor: "a plain Trainer's loop feeds it; every run logs time/round_seconds and what clients need",
    stock.WeightAveraging: "clients would not hold the average, nor would a run that goes on; lower the server's rate "
    "by model.init_args.lr_scheduler",
    stock.OnExceptionCheckpoint: "it would save the middle of a round; leave it out, a run goes on from its last "
    "checkpoint (every_n_train_steps=1: from the last round)",
}


def check_stock(callback: Callback) -> None:
    """Refuse a callback of Lightning's, or a setting of one, that waits for epochs.

    Raises:
        ValueError: Names the callback and its setting, and what to set.
    """
    reason = _reason(callback)
    if reason is not None:
        raise ValueError(f"trainer.callbacks: {type(callback).__name__}{reason}")


def _reason(callback: Any) -> str | None:
    for kind, instead in REFUSED.items():
        if isinstance(callback, kind):
            return f" cannot run here: {instead}"
    if isinstance(callback, stock.ModelCheckpoint):
        return _of_checkpoint(callback)
    if isinstance(callback, stock.EarlyStopping):
        return _of_stopping(callback)
    if isinstance(callback, stock.LearningRateMonitor) and callback.logging_interval == "epoch":
        return "(logging_interval='epoch') would log once, for a run is one epoch; set logging_interval to step"
    if isinstance(callback, stock.Timer) and callback._interval == "epoch":
        return "(interval='epoch') would look once, at the end, for a run is one epoch; set interval to step"
    return None


def _of_checkpoint(callback: Any) -> str | None:
    if callback.save_on_exception:
        return "(save_on_exception=True) would save the middle of a round; leave it out, a run goes on from its last " \
               "checkpoint (every_n_train_steps=1: from the last round)"  # fmt: skip
    if callback._every_n_epochs > 1:
        return f"(every_n_epochs={callback._every_n_epochs}) would never save, for a run is one epoch; set " \
               "every_n_train_steps, which counts rounds, or leave both out to save at every validation"  # fmt: skip
    if callback._save_on_train_epoch_end:
        return "(save_on_train_epoch_end=True) would save once, at the end, for a run is one epoch; leave it out to " \
               "save at every validation"  # fmt: skip
    names = {"filename": callback.filename, "CHECKPOINT_NAME_LAST": callback.CHECKPOINT_NAME_LAST}
    for name, value in names.items():
        if "{epoch" in (value or ""):
            return f"({name}={value!r}): a run is one epoch, so {{epoch}} is always 0; take {{round}} or {{step}}"
    return None


def _of_stopping(callback: Any) -> str | None:
    if callback._check_on_train_epoch_end:
        return "(check_on_train_epoch_end=True) would look once, at the end, for a run is one epoch; leave it out to " \
               "look at every validation (trainer.val_check_interval)"  # fmt: skip
    if callback.strict and callback.monitor.startswith("train/"):
        return f"(monitor={callback.monitor!r}) looks at every validation, and the first is before there is a round; " \
               "monitor what a validation logs, as val/loss"  # fmt: skip
    return None
