"""How a cut model is evaluated: both halves on raw data, with torchmetrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchmetrics import Metric

from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.padding import drop_unpredictable

Batch = dict[str, Tensor]
Metrics = dict[str, Metric]


class TermMean(Metric):
    """``Σ_b n_b m_b / Σ_b n_b`` of batch means ``m_b`` over ``n_b`` terms; a NaN among them stays.

    torchmetrics' ``MeanMetric`` leaves NaN out of the mean, or, told not to, the weights.
    """

    full_state_update = False
    total: Tensor
    terms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("terms", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, weight: float) -> None:
        """Take in a batch's mean over ``weight`` terms."""
        self.total += weight * mean.detach().float()
        self.terms += weight

    def compute(self) -> Tensor:
        """The mean over all terms."""
        return self.total / self.terms


class Both:
    """Two metrics that are told the same."""

    def __init__(self, *metrics: Metric) -> None:
        self.metrics = metrics

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Of each."""
        for metric in self.metrics:
            metric.update(*args, **kwargs)


class Evaluated(L.LightningModule):
    """The hooks of Trainer's evaluation loops; a subclass says what the logits, the loss and its terms are."""

    prepare: Any
    logits: Any
    loss: Any
    count: Any
    above: Any
    #: Whether the rounds are compiled; an evaluation is not.
    compiles = False
    #: A second set of metrics, of a part of an evaluation.
    beside: Metrics | None = None

    def make_metrics(self) -> None:
        """One set for each of ``val`` and ``test``."""
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict(self.build_metrics()) for stage in ("val", "test")})
        for metric in self.metrics.modules():
            if isinstance(metric, Metric):
                metric.sync_on_compute = False  # every process evaluates all of the data

    def build_metrics(self) -> dict[str, Metric]:
        """torchmetrics of one evaluation, by name; ``loss`` is always among them."""
        return {"loss": TermMean()}

    def update_metrics(self, metrics: Metrics, logits: Tensor, labels: Tensor) -> None:
        """Take one evaluation batch into the metrics."""
        metrics["loss"].update(self.loss(logits, labels), weight=self.count(labels))

    def take(self, metrics: Metrics, batch: Batch, labels: Tensor) -> Tensor:
        """Take a prepared batch of raw data into the metrics; its loss. ``labels`` are those that count."""
        return self._taken(metrics, self.logits(batch), labels)

    def take_smashed(self, metrics: Metrics, z: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The same of what a client sent: ``z (B, S, h)``, ``attention_mask (B, S)``, ``labels``."""
        return self._taken(metrics, self.above(z, attention_mask), labels)

    def _taken(self, metrics: Metrics, logits: Tensor, labels: Tensor) -> Tensor:
        self.update_metrics(metrics, logits, labels)
        return self.loss(logits, labels)

    def computed(self, metrics: Metrics) -> dict[str, Tensor]:
        """The values to log at the end of an evaluation, by name."""
        return {name: metric.compute() for name, metric in metrics.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Both halves on raw data; the batch's loss, None where nothing in it is labelled."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    @contextmanager
    def also(self, metrics: Metrics) -> Iterator[None]:
        """What is evaluated inside goes into these as well, which are made by `build_metrics`."""
        self.beside = metrics
        try:
            yield
        finally:
            self.beside = None

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """``argmax`` of the logits: a class an example, or the next token at every position."""
        with eager(self.compiles):
            return self.logits(self.prepare(batch)).argmax(-1)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self._log_metrics("test")

    def _evaluate(self, batch: Batch, stage: str) -> Tensor | None:
        """The batch's loss; None where it has no loss term, as a mean over nothing is no number."""
        batch = self.prepare(batch)
        labels = drop_unpredictable(batch["labels"], batch["attention_mask"])
        metrics = self._metrics(stage)
        if self.beside is not None:
            metrics = {name: cast(Metric, Both(metric, self.beside[name])) for name, metric in metrics.items()}
        with eager(self.compiles):  # a shape of its own would be compiled for a forward or two
            return self.take(metrics, batch, labels) if self.count(labels) else None

    def _metrics(self, stage: str) -> Metrics:
        return dict(self.metrics[stage].items())  # type: ignore[operator]

    def _log_metrics(self, stage: str) -> None:
        metrics = self._metrics(stage)
        self.log_dict({f"{stage}/{name}": value for name, value in self.computed(metrics).items()})
        for metric in metrics.values():
            metric.reset()
