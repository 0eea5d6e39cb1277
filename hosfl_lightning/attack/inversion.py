"""Inversion by gradient: the input that gives this z, moved until it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hosfl_lightning.attack.halves import TextHalf, cosines

#: Steps of Adam, and its rates: of embeddings in parts of their size, of pixels as they are.
STEPS, TEXT_RATE, IMAGE_RATE = 200, 0.1, 0.05
#: Weight of the total variation beside the relative squared error of z.
SMOOTH = 1e-3


def invert_text(half: TextHalf, z: Tensor, mask: Tensor, steps: int = STEPS) -> Tensor:
    r"""``min_e ‖f_c(e) − z‖² / ‖z‖²`` over embeddings, then the nearest token: ``(B, S)``.

    It begins at the embeddings of `nearest_alone`, and needs no causal half.

    Args:
        half: The client half.
        z: ``(B, S, h)``.
        mask: ``(B, S)``.
        steps: Of Adam.

    Reference: the optimisation of ActInv, arXiv 2605.23158, and of BiSR, arXiv 2409.00960; without their learned parts.
    """
    e = half.table[nearest_alone(half, z)].detach().clone()
    rate = TEXT_RATE * float(half.table.square().mean().sqrt())
    x = minimise(e, lambda e: _relative(half(e, mask), z, mask[..., None]), rate, steps)
    return cosines(x, half.table).argmax(-1)


def nearest_alone(half: TextHalf, z: Tensor) -> Tensor:
    """``(…,)``: the token whose z, as the only one of a text, has the largest cosine with each row of ``z (…, h)``."""
    return cosines(z, half.alone).argmax(-1)


def invert_images(half: Callable[[Tensor], Tensor], z: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
    r"""``min_x ‖f_c(x) − z‖² / ‖z‖² + SMOOTH · TV(x)``: images ``(B, C, H, W)``.

    Args:
        half: The client half.
        z: ``(B, S, h)``.
        start: ``(C, H, W)``, where each image begins.
        steps: Of Adam.
    """
    x = start.expand(len(z), *start.shape).clone()
    return minimise(x, lambda x: _relative(half(x), z, torch.ones(())) + SMOOTH * _variation(x), IMAGE_RATE, steps)


def minimise(x: Tensor, loss: Callable[[Tensor], Tensor], rate: float, steps: int) -> Tensor:
    """Adam on ``x`` alone, its rate falling to zero like a cosine."""
    x = x.detach().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            (x.grad,) = torch.autograd.grad(loss(x), [x])
            optimizer.step()
            schedule.step()
    return x.detach()


def _relative(found: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    return ((found - wanted).float() * counted).square().sum() / wanted.float().square().sum()


def _variation(x: Tensor) -> Tensor:
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
