"""Two layers with a linear auxiliary head, and the same trained in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosfl_lightning.split import LinearHead, linear_head
from tests.algorithms.two_layers import CLASSES, WIDTH, Points, TwoLayers, plain

Gradient = Callable[[Callable[[], Tensor], list[Tensor], int, int, int], Sequence[Tensor]]
"""Of the objective at the parameters, given the client, the round and the local step."""
Correction = Callable[[nn.Module, Tensor, Tensor, Tensor, int, int], None]
"""Of the head, given z, labels, λ, the round and the local step."""


class WithHead(TwoLayers):
    """The head is linear."""

    def auxiliary_head(self, blocks: int) -> LinearHead:
        return linear_head(WIDTH, CLASSES, blocks, seed=1)


class Reference:
    """A client half, a head and a server half in plain PyTorch, as they start; ``run`` trains them."""

    def __init__(self, model: WithHead) -> None:
        self.first, self.second = plain(model)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.head.load_state_dict(model.auxiliary_head(0).linear.state_dict())

    def run(
        self, sampled: Sequence[Sequence[int]], gradient: Gradient, local_steps: int = 1, upload_every: int = 1,
        lr: float = 0.1, correct: Correction | None = None,
    ) -> None:  # fmt: skip
        """Rounds of the clients in ``sampled``, SGD with 0.2 at the server."""
        data = Points()
        data.setup("fit")
        own = [*self.first.parameters(), *self.head.parameters()]
        server = torch.optim.SGD(self.second.parameters(), lr=0.2)
        for r, clients in enumerate(sampled):
            start = [p.detach().clone() for p in own]
            ends, counts = [], []
            for k in clients:
                _copy(own, start)
                counts.append(0)
                for s in range(local_steps):
                    t = r * local_steps + s
                    batch = data.client_batch(k, t)
                    x, y = batch["points"], batch["labels"]
                    counts[-1] += len(y)
                    z = self.first(x).detach().requires_grad_()
                    if t % upload_every == 0:
                        server.zero_grad()
                        F.cross_entropy(self.second(z), y).backward()
                        server.step()
                    directions = gradient(lambda x=x, y=y: F.cross_entropy(self.head(self.first(x)), y), own, k, r, s)
                    with torch.no_grad():
                        for p, g in zip(own, directions):
                            p -= lr * g
                    if correct is not None and z.grad is not None:
                        correct(self.head, z, y, z.grad, r, s)
                ends.append([p.detach().clone() for p in own])
            w = [n / sum(counts) for n in counts]
            _copy(own, [sum(a * end[i] for a, end in zip(w, ends)) for i in range(len(own))])  # type: ignore[misc]

    def assert_equal(self, model: WithHead, trainer: Any, tolerance: float = 1e-6) -> None:
        """To rounding: the weights of client half, head and server half of the run, and of its model."""
        mine = [*trainer.endpoint.trained.values(), *model.server_half.layer.parameters()]
        assert all(a is b for a, b in zip(mine, model.client_half.parameters()))
        theirs = [*self.first.parameters(), *self.head.parameters(), *self.second.parameters()]
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def exact(objective: Callable[[], Tensor], own: list[Tensor], client: int, round: int, step: int) -> Sequence[Tensor]:
    """By backprop."""
    return torch.autograd.grad(objective(), own)


@torch.no_grad()
def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values):
        p.copy_(value)
