"""The training loss of methods in which only the clients know it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hosfl_lightning.wire import ProjectedGradients, Weights


def told_loss(answers: Sequence[ProjectedGradients]) -> Tensor:
    """``Σ_k w_k ℓ_k`` of what the clients say, 0-d."""
    terms = sum(answer.num_terms for answer in answers)
    return torch.tensor(sum(answer.num_terms / terms * (answer.loss or 0.0) for answer in answers))


def untold_loss(answer: ProjectedGradients | Weights) -> str | None:
    """Why a client that trained without saying its loss is refused, in words; None: it says it."""
    if answer.num_terms and answer.loss is None:
        return "it does not say its loss, which nobody else knows"
    return None
