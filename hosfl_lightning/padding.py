"""Several clients' batches as one: rows below each other, padded on the right to the longest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: What stands at padding: no token, no label.
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def stack_rows(parts: Sequence[Tensor], fill: float = 0) -> Tensor:
    """``(B_k, S_k, …)`` to ``(Σ B_k, max S_k, …)``; ``(B_k,)`` are concatenated."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([_widen(part, width, fill) for part in parts])


def _widen(part: Tensor, width: int, fill: float) -> Tensor:
    missing = width - part.shape[1]
    return torch.cat([part, part.new_full((len(part), missing, *part.shape[2:]), fill)], dim=1) if missing else part


def drop_unpredictable(labels: Tensor, mask: Tensor) -> Tensor:
    """Labels ``(B, S)`` without those whose previous position is padding: with padding on the left the first token has
    none to predict it, and what stands at padding does not travel. ``(B,)`` labels are returned as they are.
    """
    if labels.dim() == 1:
        return labels
    kept = labels.clone()
    kept[:, 1:].masked_fill_(mask[:, :-1] == 0, FILL["labels"])
    return kept
