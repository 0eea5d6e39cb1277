"""The metrics of a round: collected as they are logged, written once it is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MetricRow:
    """One row.

    Args:
        trainer: A `hosfl_lightning.run.face.TrainerFace`, whose callbacks and loggers read it.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.values: dict[str, Any] = {}

    def take(self, metrics: dict[str, Any]) -> None:
        """What was logged."""
        # fp64: a count of bytes is exact only to 2**24 in fp32.
        values = {
            name: value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for name, value in metrics.items()
        }
        self.values.update(values)
        self.trainer.callback_metrics.update(values)

    def drop(self) -> None:
        """It stands elsewhere already."""
        self.values = {}

    def flush(self) -> None:
        """Write it; the only place where metrics leave the device."""
        trainer = self.trainer
        if self.values and (trainer.should_log or any(name.startswith(("val/", "test/")) for name in self.values)):
            row = {name: float(value) for name, value in self.values.items()}
            trainer.logged_metrics = dict(self.values)
            trainer.progress_bar_metrics = {n: row[n] for n in ("train/loss", "val/loss") if n in row}
            for logger in trainer.loggers:
                logger.log_metrics({**row, "round": trainer.global_step}, step=trainer.global_step)
                logger.save()
        self.values = {}
