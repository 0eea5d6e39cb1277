"""Scores against what is known of them, and label attacks against labels that are known."""

from __future__ import annotations

import pytest
import torch

from hosfl_lightning.attack.labels import behind_head, clustered
from hosfl_lightning.attack.score import Score, auc, auc_score, exact, interval, rouge_l, tokens, wilson


def test_wilson_is_the_textbook_s() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)  # a bootstrap would say (1, 1)


def test_a_bootstrap_holds_the_mean_and_narrows() -> None:
    few, many = ([0.0, 0.5, 1.0, 0.5] * n for n in (2, 50))
    (a, b), (c, d) = interval(few), interval(many)
    assert a < c < 0.5 < d < b


def test_measures_of_tokens() -> None:
    truth, shifted = [1, 2, 3, 4], [9, 1, 2, 3]
    assert (exact(truth, shifted), rouge_l(truth, shifted), rouge_l(truth, truth)) == (0.0, 0.75, 1.0)
    assert rouge_l([1, 2], [1, 2, 9]) == 0.8
    told = tokens("search", [truth], [truth], usual=3)
    assert [(one.value, one.trivial) for one in told] == [(1.0, 0.25), (1.0, 0.25)]


def test_auc_and_its_interval() -> None:
    assert auc([2, 3], [1, 2]) == 0.875
    score = auc_score("membership", [1.0, 2.0, 3.0, 4.0], [0.0, 1.5, 2.5, 0.5])
    assert isinstance(score, Score)
    assert score.low <= score.value <= score.high <= 1 and score.trivial == 0.5 and score.count == 8


def test_labels_follow_from_a_known_head() -> None:
    """λ₂ of a norm and a linear head, in which the label's own row is not the nearest of all."""
    torch.manual_seed(0)
    norm, linear = torch.nn.RMSNorm(8), torch.nn.Linear(8, 30, bias=False)
    z, labels = torch.randn(2, 5, 8, requires_grad=True), torch.randint(30, (2, 5))
    with torch.no_grad():
        norm.weight.uniform_(0.2, 3)

    def head(z: torch.Tensor) -> torch.Tensor:
        return linear(norm(z))

    loss = torch.nn.functional.cross_entropy(head(z).flatten(0, 1), labels.flatten())
    (multiplier,) = torch.autograd.grad(loss, [z])
    assert torch.equal(behind_head(head, z, multiplier), labels)


def test_directions_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 6)
    rows = torch.stack([centres[i % 3] + 0.1 * torch.randn(6, generator=generator) for i in range(12)])
    found = clustered(torch.nn.functional.normalize(rows, dim=-1), 3)
    assert len(set(found)) == 3
    assert all(found[i] == found[i % 3] for i in range(12))
