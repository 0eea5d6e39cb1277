"""A split sequence classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import AutoModelForSequenceClassification

from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models.base import default_optimizer
from hosfl_lightning.models.classification import SplitClassifier, check_classes
from hosfl_lightning.models.halves import Labels, Part
from hosfl_lightning.split import Lora, Side
from hosfl_lightning.split.client_parameters import ClientParameters


class SplitSequenceClassifier(SplitClassifier):
    r"""``ℓ = −(1/n) Σ_i log p(y_i | x_i)`` over the ``n`` examples, in nats; the head is trained, where the labels are.

    ``labels (B,)``. Logs ``loss`` and ``accuracy`` (micro). ``num_labels`` is the number of classes; where
    ``pretrained`` has another number it gets a fresh head. The other arguments as in `SplitModule`.
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
        side: Side | None = None,
        part: Part = "both",
        client_parameters: ClientParameters | None = None,
        labels: Labels = "server",
        compile: bool = False,
    ) -> None:
        self.num_labels = check_classes(num_labels)
        super().__init__(
            pretrained, cut, lora, optimizer, lr_scheduler, dtype, seed, client_holds, side, part,
            client_parameters, labels, compile, num_labels=num_labels,
        )  # fmt: skip

    def check_examples(self, examples: Sequence[Example], owner: str) -> None:
        """Token ids and lengths that the model can take, and labels within ``num_labels``."""
        super().check_examples(examples, owner)
        self.check_labels(examples, owner)
