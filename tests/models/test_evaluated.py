"""A validation loss is the mean over all terms, however they fall into batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hosfl_lightning import Orchestrator, SplitCausalLM
from hosfl_lightning.models.evaluated import TermMean
from tests.random_tokens import RandomTokens


class Uneven(RandomTokens):
    """The last batch is short, and its rows are."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.validation_set = [*self.validation_set, self.clients[0][0]]


def test_batches_count_by_their_terms(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    model, data = make_model(), Uneven([[3, 8], [6]])
    [found] = make_orchestrator().validate(model, data)
    losses, counts = [], []
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels = batch["labels"]
            losses.append(model.loss(model(batch["input_ids"], batch["attention_mask"]), labels).item())
            counts.append(model.count(labels))
    assert len(set(counts)) > 1
    expected = sum(n * loss for n, loss in zip(counts, losses)) / sum(counts)
    assert found["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert found["val/loss"] != pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_nan_stays() -> None:
    mean = TermMean()
    mean.update(torch.tensor(1.0), 3)
    mean.update(torch.tensor(float("nan")), 1)
    assert mean.compute().isnan()
