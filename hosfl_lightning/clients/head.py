"""The head and the loss at a client that keeps its labels: z₂ comes, λ₂ goes, and no graph is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def of_head(model: Any) -> dict[str, nn.Parameter]:
    """Of a model's ``client_parameters`` those of its head, which come last; none where the server holds it."""
    own = {id(p) for p in model.client_head.trained.values()} if model.labels == "client" else set()
    return {name: p for name, p in model.client_parameters.items() if id(p) in own}


def of_half(model: Any) -> dict[str, nn.Parameter]:
    """The others: θ_c of the layers before the cut."""
    head = of_head(model)
    return {name: p for name, p in model.client_parameters.items() if name not in head}


class HeadClient:
    r"""``ℓ_k(f_h(z₂; θ_h), y_k)``, its ``λ₂ = ∂ℓ_k/∂z₂``, and ``∂ℓ_k/∂θ_h`` where the head is trained; in closed form.

    Args:
        head: A model's ``client_head``.
    """

    def __init__(self, head: Any) -> None:
        self.head = head.eval()
        for parameter in head.trained.values():
            parameter.requires_grad_(False)
        self.size = sum(p.numel() for p in head.trained.values())

    @torch.no_grad()
    def answer(self, z: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss (0-d), ``λ₂ (B, S, h)``, and the gradient of what is trained, ``(size,)`` fp32 on the host.

        Args:
            z: ``z₂ (B, S, h)``.
            mask: ``attention_mask (B, S)``.
            labels: As the model takes them; at least one of them is a loss term.
        """
        found = self.head.differentiate(z, mask, labels)
        flat = [part.reshape(-1).float().cpu() for part in found.gradients]
        return found.loss, found.multiplier, torch.cat(flat) if flat else torch.zeros(0)
