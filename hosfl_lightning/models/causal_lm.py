"""A split causal language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from transformers import AutoModelForCausalLM

from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models.base import SplitModule
from hosfl_lightning.models.checks import check_token_labels
from hosfl_lightning.models.evaluated import Metrics
from hosfl_lightning.wire import SmashedData

IGNORE = -100


class SplitCausalLM(SplitModule):
    r"""``ℓ = −(1/n) Σ_t log p(y_{t+1} | y_≤t)`` over the ``n`` next tokens whose label is not −100, in nats.

    ``labels (B, S)`` are not shifted; the shift happens here. Logs ``loss`` (nats a token), ``perplexity``
    ``exp(loss)``, ``token_accuracy``. Arguments as in `SplitModule`.
    """

    labels_notice = "Labels travel from the clients to the server, and a causal LM's labels are its text."
    auto_class = AutoModelForCausalLM

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, fp32, of ``logits (B, S, V)`` and ``labels (B, S)``."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)

    def count(self, labels: Tensor) -> int:
        """Next tokens that are labelled."""
        return int((labels[:, 1:] != IGNORE).sum())

    def check_examples(self, examples: Sequence[Example], owner: str) -> None:
        """Token ids, lengths and labels that the model can take."""
        super().check_examples(examples, owner)
        held = self.client_half if self.part == "client" else self.whole
        check_token_labels(examples, owner, held.config.get_text_config().vocab_size, IGNORE)

    def objection(self, message: SmashedData) -> str | None:
        """z has the cut's width, and the labels are tokens, one a position, or -100."""
        size = self.server_half.config.get_text_config().vocab_size
        if not message.labels_per_token:
            return "it sent one label a sequence, a causal LM has one a token"
        labels = message.labels.long()  # the size may be beyond the narrow type in which they travel
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= size))]
        if len(wrong):
            return f"its label {int(wrong[0])} is neither {IGNORE} nor in 0..{size - 1}"
        return super().objection(message)

    def build_metrics(self) -> dict[str, Metric]:
        """``loss`` and ``token_accuracy``."""
        return {**super().build_metrics(), "token_accuracy": MeanMetric()}

    def update_metrics(self, metrics: Metrics, logits: Tensor, labels: Tensor) -> None:
        """Weighted by the number of labelled tokens."""
        super().update_metrics(metrics, logits, labels)
        counted = labels[:, 1:] != IGNORE
        metrics["token_accuracy"].update((logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].float())

    def computed(self, metrics: Metrics) -> dict[str, Tensor]:
        """Adds ``perplexity``."""
        values = super().computed(metrics)
        return {**values, "perplexity": values["loss"].exp()}
