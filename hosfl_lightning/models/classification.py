"""What every split classifier has in common, whatever it classifies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import PretrainedConfig

from hosfl_lightning.models.base import SplitModule
from hosfl_lightning.models.evaluated import Metrics
from hosfl_lightning.wire import SmashedData


class SplitClassifier(SplitModule):
    r"""``ℓ = −(1/n) Σ_i log p(y_i | x_i)`` over the ``n`` examples, in nats.

    ``labels (B,)``. Logs ``loss`` and ``accuracy`` (micro). A subclass sets ``num_labels``, the number of classes.
    """

    num_labels: int

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, fp32, of ``logits (B, C)`` and ``labels (B,)``."""
        return F.cross_entropy(logits.float(), labels)

    def count(self, labels: Tensor) -> int:
        """Examples."""
        return labels.numel()

    def check_labels(self, examples: Sequence[Any], owner: str) -> None:
        """Refuse labels beyond ``num_labels``, and several for one example.

        Raises:
            ValueError: Names whose they are.
        """
        if any(not isinstance(e.labels, int) and torch.as_tensor(e.labels).ndim for e in examples):
            raise ValueError(
                f"data of {owner}: several labels an example, and {type(self).__name__} has one class for each; take "
                "ClassificationData without a prompt, or SplitCausalLM"
            )
        wrong = [int(e.labels) for e in examples if not 0 <= int(e.labels) < self.num_labels]
        if wrong:
            raise ValueError(
                f"data of {owner}: label {wrong[0]} is not in 0..{self.num_labels - 1}; set "
                "model.init_args.num_labels to the number of classes"
            )

    def name_labels(self, names: Sequence[str]) -> None:
        """Also into the model's configuration, as ``id2label`` and ``label2id``.

        Raises:
            ValueError: There are not ``num_labels``.
        """
        if len(names) != self.num_labels:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(
                f"model.init_args.num_labels is {self.num_labels}, and the data has {len(names)} classes ({known}): "
                "set it to that number, or data.init_args.labels to a file with all names"
            )
        super().name_labels(names)
        config = getattr(self.whole, "config", None) if self.part == "both" else None
        if isinstance(config, PretrainedConfig):
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}

    def objection(self, message: SmashedData) -> str | None:
        """z has the cut's width, and the labels are classes, one a sequence."""
        if message.labels_per_token:
            return "it sent one label a token, a classifier has one a sequence"
        labels = message.labels.long()  # the number may be beyond the narrow type in which they travel
        wrong = labels[(labels < 0) | (labels >= self.num_labels)]
        if len(wrong):
            return f"its label {int(wrong[0])} is not in 0..{self.num_labels - 1}"
        return super().objection(message)

    def build_metrics(self) -> dict[str, Metric]:
        """``loss`` and ``accuracy``."""
        return {**super().build_metrics(), "accuracy": MulticlassAccuracy(self.num_labels, average="micro")}

    def update_metrics(self, metrics: Metrics, logits: Tensor, labels: Tensor) -> None:
        """One batch."""
        super().update_metrics(metrics, logits, labels)
        metrics["accuracy"].update(logits, labels)


def check_classes(num_labels: int) -> int:
    """The number of classes.

    Raises:
        ValueError: There is nothing to tell apart.
    """
    if num_labels < 2:
        raise ValueError(
            f"model.init_args.num_labels={num_labels}: a classifier tells at least 2 classes apart (one logit, as for "
            "regression, is not supported); set it to the number of classes, 2 for yes and no"
        )
    return num_labels
