"""What the references of the methods with local steps share: plain PyTorch, nothing of the package but its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosfl_lightning import optim
from hosfl_lightning.algorithms import Algorithm, FedAvg, SplitFedV1, SplitFedV2, SplitLearning
from hosfl_lightning.algorithms.local_training import LocalTraining
from tests.algorithms.two_layers import Points, TwoLayers

METHODS: list[type[Algorithm]] = [SplitFedV1, SplitFedV2, SplitLearning, FedAvg]
#: Every round both learning rates fall to this share of what they were.
GAMMA = 0.7
RULES: dict[str, Any] = {
    "sgd": (optim.SGD(lr=0.2), lambda p: torch.optim.SGD(p, lr=0.2)),
    "adamw": (optim.AdamW(lr=0.03, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1)),
}


def falling(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA)


def method(kind: type[Algorithm], rule: str = "adamw", **settings: Any) -> LocalTraining:
    made = kind(client_optimizer=RULES[rule][0], client_scheduler=falling, **settings)
    assert isinstance(made, LocalTraining)
    return made


def two_layers(rule: str = "adamw") -> TwoLayers:
    return TwoLayers(RULES[rule][1], client_holds="whole", lr_scheduler=falling)


class Reference:
    """Optimizers by whose they are; their moments last, their learning rate is the round's.

    Args:
        data: The clients' data.
        rule: A key of `RULES`.
    """

    def __init__(self, data: Points, rule: str) -> None:
        self.data, self.make = data, RULES[rule][1]
        self.latest: dict[Any, torch.optim.Optimizer] = {}

    def optimizer(self, owner: Any, parameters: Any, round: int) -> torch.optim.Optimizer:
        optimizer = self.make(parameters)
        lr = optimizer.param_groups[0]["lr"] * GAMMA**round
        if owner in self.latest:
            optimizer.load_state_dict(self.latest[owner].state_dict())
        optimizer.param_groups[0]["lr"] = lr
        self.latest[owner] = optimizer
        return optimizer

    def train(self, net: nn.Module, client: int, round: int, steps: int, *optimizers: torch.optim.Optimizer) -> int:
        """Local steps of a client on the whole model; how many examples it has seen."""
        seen = 0
        for step in range(steps):
            batch = self.data.client_batch(client, round * steps + step)
            net.zero_grad()
            F.cross_entropy(net(batch["points"]), batch["labels"]).backward()
            for optimizer in optimizers:
                optimizer.step()
            seen += len(batch["labels"])
        return seen


def average_(into: nn.Module, trained: Sequence[nn.Module], seen: Sequence[int]) -> None:
    """``θ ← Σ_k n_k θ_k / Σ_k n_k``."""
    for target, *given in zip(into.parameters(), *(net.parameters() for net in trained), strict=True):
        mean: Tensor = sum((p.detach() * n for p, n in zip(given, seen)), torch.zeros(())) / sum(seen)
        target.data.copy_(mean)
