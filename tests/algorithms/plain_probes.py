"""What the references of the methods that probe share: whole tensors moved and put back, losses in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosfl_lightning import optim
from hosfl_lightning.rng import Domain, Stream, direction
from tests.algorithms.two_layers import Points

MU = 2**-6
RULES: dict[str, Any] = {
    "sgd": (optim.SGD(lr=0.2), lambda p: torch.optim.SGD(p, lr=0.2)),
    "adamw": (optim.AdamW(lr=0.03, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1)),
}


def drawn(parameters: Sequence[nn.Parameter], round: int, probe: int) -> list[Tensor]:
    """The direction of a probe, tensor after tensor, of run seed 0."""
    stream = Stream(0, Domain.RADEMACHER, round=round, probe=probe)
    return [direction(stream, i, 0, p.numel()).view_as(p) for i, p in enumerate(parameters)]


@contextmanager
def moved(parameters: Sequence[nn.Parameter], u: Sequence[Tensor], scale: float) -> Iterator[None]:
    """``θ + scale · u`` inside."""
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, u, strict=True):
            p.add_(d, alpha=scale)
        yield
        for p, bits in zip(parameters, saved):
            p.copy_(bits)


def step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradient: Sequence[Tensor]) -> None:
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g
    optimizer.step()


def expanded(parameters: Sequence[nn.Parameter], values: Sequence[Tensor], round: int, first: int = 0) -> list[Tensor]:
    """``(1/P) Σ_p v_p u_p`` from the round's directions ``first .. first + P − 1``."""
    total = [torch.zeros_like(p) for p in parameters]
    for p, v in enumerate(values):
        for t, d in zip(total, drawn(parameters, round, first + p)):
            t += v * d / len(values)
    return total


def central(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], round: int, probe: int) -> Tensor:
    """``(ℓ(θ + μu) − ℓ(θ − μu)) / 2μ``."""
    u, sides = drawn(parameters, round, probe), []
    for scale in (MU, -MU):
        with moved(parameters, u, scale):
            sides.append(loss().double())
    return ((sides[0] - sides[1]) / (2 * MU)).float()


def minibatches(data: Points, clients: Sequence[int], round: int) -> list[tuple[dict[str, Tensor], float]]:
    """Each client's with its weight."""
    batches = [data.client_batch(k, round) for k in clients]
    total = sum(len(b["labels"]) for b in batches)
    return [(b, len(b["labels"]) / total) for b in batches]


def points() -> Points:
    data = Points()
    data.setup("fit")
    return data


def nats(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch["points"]), batch["labels"])
