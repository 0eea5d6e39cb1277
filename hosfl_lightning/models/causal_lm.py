"""A split causal language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from transformers import AutoModelForCausalLM

from hosfl_lightning.data.prompt import LabelWords
from hosfl_lightning.data.tokenization import Example
from hosfl_lightning.models.base import SplitModule
from hosfl_lightning.models.checks import check_token_labels
from hosfl_lightning.models.evaluated import Batch, Metrics
from hosfl_lightning.split import ServerHalf, run
from hosfl_lightning.split.closed_form import IGNORE, following
from hosfl_lightning.split.labelled import read_labelled, reads_alike
from hosfl_lightning.wire import SmashedData


class SplitCausalLM(SplitModule):
    r"""``ℓ = −(1/n) Σ_t log p(y_{t+1} | y_≤t)`` over the ``n`` next tokens whose label is not −100, in nats.

    ``labels (B, S)`` are not shifted; the shift happens here. Logs ``loss`` (nats a token), ``perplexity``
    ``exp(loss)``, ``token_accuracy``, and with label words ``label_word_accuracy``: of the words' logits, where the
    words differ, the largest is that of the example's class (as MeZO reports). Arguments as in `SplitModule`.

    Training and validation make logits at labelled positions alone, a piece at a time, with the same numbers up to
    rounding; at all positions where a subclass has a `loss`, `logits` or `update_metrics` of its own, or the server's
    half is compiled or hooked.
    """

    labels_notice = "Labels travel from the clients to the server, and a causal LM's labels are its text."
    auto_class = AutoModelForCausalLM
    label_words: LabelWords | None = None
    _alike: bool | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy, fp32, of ``logits (B, S, V)`` and ``labels (B, S)``."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """As in `SplitModule`."""
        targets = following(batch["labels"])
        if not self._sparse("loss") or not bool((targets != IGNORE).any()):
            return super().training_step(batch, batch_idx)
        half, states = self.last(batch["z"], batch["attention_mask"])
        return read_labelled(half, states, batch["attention_mask"], targets, losses).mean()

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
        low, high = map(int, labels.aminmax()) if len(labels) else (0, 0)
        if low < 0 or high >= size:  # of what is ignored, or wrong
            wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= size))]
            if len(wrong):
                return f"its label {int(wrong[0])} is neither {IGNORE} nor in 0..{size - 1}"
        return super().objection(message)

    def choose_among(self, words: LabelWords | None) -> None:
        """Label words of the data, for ``label_word_accuracy``; None: it has none. Metrics begin anew."""
        if words != self.label_words:
            self.label_words = words
            self.make_metrics()

    def build_metrics(self) -> dict[str, Metric]:
        """``loss``, ``token_accuracy``, and with label words ``label_word_accuracy``."""
        words = {} if self.label_words is None else {"label_word_accuracy": MeanMetric()}
        return {**super().build_metrics(), "token_accuracy": MeanMetric(), **words}

    def update_metrics(self, metrics: Metrics, logits: Tensor, labels: Tensor) -> None:
        """Weighted by the number of labelled tokens; the label words' by that of examples."""
        super().update_metrics(metrics, logits, labels)
        targets = following(labels)
        counted = targets != IGNORE
        self._count_hits(metrics, self._figures(logits[counted], targets[counted]), targets)

    def take(self, metrics: Metrics, batch: Batch, labels: Tensor) -> Tensor:
        """As in `Evaluated`."""
        if not self._sparse("loss", "logits", "update_metrics"):
            return super().take(metrics, batch, labels)
        return self.take_smashed(metrics, run(self.client_half, batch), batch["attention_mask"], labels)

    def take_smashed(self, metrics: Metrics, z: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """As in `Evaluated`."""
        if not self._sparse("loss", "update_metrics"):
            return super().take_smashed(metrics, z, attention_mask, labels)
        targets = following(labels)
        half, states = self.last(z, attention_mask)
        figures = read_labelled(half, states, attention_mask, targets, self._figures)
        loss = figures[:, 0].mean()
        metrics["loss"].update(loss, weight=len(figures))
        self._count_hits(metrics, figures, targets)
        return loss

    def _figures(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of labelled tokens: loss, whether the largest logit is the token's, and the token of the likeliest word."""
        figures = [losses(logits, targets), (logits.argmax(-1) == targets).float()]
        if self.label_words is not None:
            # As a number of a word: fp32 holds few of the tokens' numbers, and all of these.
            figures.append(logits[:, list(self.label_words.tokens)].argmax(-1).float())
        return torch.stack(figures, dim=-1)

    def _count_hits(self, metrics: Metrics, figures: Tensor, targets: Tensor) -> None:
        metrics["token_accuracy"].update(figures[:, 1])
        if self.label_words is not None:
            counted = targets != IGNORE
            here = (counted.cumsum(-1) == self.label_words.place + 1)[counted]  # one token of each row
            tokens = torch.tensor(self.label_words.tokens, device=targets.device)
            metrics["label_word_accuracy"].update((tokens[figures[here, 2].long()] == targets[counted][here]).float())

    def _sparse(self, *own: str) -> bool:
        """Whether logits at labelled positions do, where only these methods make or see logits."""
        half = self.server_half if self.client_head is None else self.client_head
        # Of the instance: a method may have been set on it alone.
        plain = any(getattr(getattr(self, n), "__func__", None) is not getattr(SplitCausalLM, n) for n in own)
        if plain or not isinstance(half, ServerHalf) or half._compiled_call_impl is not None or half._forward_hooks:
            return False
        if self._alike is None:
            self._alike = reads_alike(half)
        return self._alike

    def computed(self, metrics: Metrics) -> dict[str, Tensor]:
        """Adds ``perplexity``."""
        values = super().computed(metrics)
        return {**values, "perplexity": values["loss"].exp()}


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropies ``(m,)``, fp32, of ``logits (m, V)`` and ``targets (m,)``."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
