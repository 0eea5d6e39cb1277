"""A split sequence classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification

from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.servers.base import Metrics, SplitModule, default_optimizer
from hosfl_lightning.split import Lora
from hosfl_lightning.wire import SmashedData


class SplitSequenceClassifier(SplitModule):
    r"""``ℓ = −(1/n) Σ_i log p(y_i | x_i)`` over the ``n`` examples, in nats; the head is the server's and is trained.

    ``labels (B,)``. Logs ``loss`` and ``accuracy`` (micro). ``num_labels`` is the number of classes; the other
    arguments as in `SplitModule`.
    """

    auto_class = AutoModelForSequenceClassification
    trains_head = True

    def __init__(
        self,
        pretrained: str,
        cut: int,
        num_labels: int,
        lora: Lora | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        seed: int = 0,
        client_holds: Literal["half", "whole"] = "half",
    ) -> None:
        self.num_labels = num_labels
        super().__init__(
            pretrained, cut, lora, optimizer, lr_scheduler, dtype, seed, client_holds, num_labels=num_labels
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, fp32, of ``logits (B, C)`` and ``labels (B,)``."""
        return F.cross_entropy(logits.float(), labels)

    def count(self, labels: Tensor) -> int:
        """Examples."""
        return labels.numel()

    def check_examples(self, examples: Sequence[Example], owner: str) -> None:
        """As in `SplitModule`, and the labels are within ``num_labels``."""
        super().check_examples(examples, owner)
        wrong = [e.labels for e in examples if not 0 <= int(e.labels) < self.num_labels]  # type: ignore[arg-type]
        if wrong:
            raise ValueError(
                f"data of {owner}: label {wrong[0]} is not in 0..{self.num_labels - 1}; set "
                "model.init_args.num_labels to the number of classes"
            )

    def objection(self, message: SmashedData) -> str | None:
        """As in `SplitModule`, and the labels are classes, one a sequence."""
        if message.labels_per_token:
            return "it sent one label a token, a classifier has one a sequence"
        labels = message.labels.long()  # the number may be beyond the narrow type in which they travel
        wrong = labels[(labels < 0) | (labels >= self.num_labels)]
        if len(wrong):
            return f"its label {int(wrong[0])} is not in 0..{self.num_labels - 1}"
        return super().objection(message)

    def build_metrics(self) -> dict[str, Metric]:
        """``loss`` and ``accuracy``."""
        return {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(self.num_labels, average="micro")}

    def update_metrics(self, metrics: Metrics, logits: Tensor, labels: Tensor) -> None:
        """One batch."""
        super().update_metrics(metrics, logits, labels)
        metrics["accuracy"].update(logits, labels)
