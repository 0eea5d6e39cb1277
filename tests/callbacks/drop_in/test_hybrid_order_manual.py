"""HybridOrder in a module that steps by itself: followed where it is simple, else refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.callbacks.drop_in.plain_modules import (
    CLASSES,
    FEATURES,
    LIGHTNING_WARNINGS,
    Sequential,
    fit,
    hybrid,
    mlp,
    same_bits,
)

pytestmark = LIGHTNING_WARNINGS


class Manual(Sequential):
    """One optimizer; a step every ``every`` batches, after it has zeroed the gradients at the start of a batch."""

    def __init__(self, *layers: nn.Module, every: int = 1) -> None:
        super().__init__(*layers)
        self.automatic_optimization, self.every = False, every

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        if batch_idx % self.every == 0:
            optimizer.zero_grad()
        self.backward_of(cross_entropy(self.net(batch[0]), batch[1]) / self.every)
        if batch_idx % self.every == self.every - 1:
            self.step(optimizer)

    def backward_of(self, loss: Tensor) -> None:
        self.manual_backward(loss)

    def step(self, optimizer: Any) -> None:
        optimizer.step()


class StepsRaw(Manual):
    """Past Lightning's wrapper, which no hook hears."""

    def step(self, optimizer: Any) -> None:
        self.optimizers(use_pl_optimizer=False).step()  # type: ignore[union-attr]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", [Manual, StepsRaw])
def test_manual_optimization_is_automatic_optimization(kind: type[Manual], every: int) -> None:
    manual, automatic, order = kind(*mlp(nn.Dropout(0.3)).net, every=every), mlp(nn.Dropout(0.3)), hybrid("net.3")
    for module, callback, accumulated in ((manual, order, 1), (automatic, hybrid("net.3"), every)):
        torch.manual_seed(3)
        fit(module, callback, accumulate_grad_batches=accumulated, max_epochs=2)
    assert same_bits(manual, automatic)
    assert order._client.optimizer.steps == 8 // every  # type: ignore[union-attr]


class Scattered(Manual):
    """The module calls its layers one by one, so a probe would have to run training_step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        z = self.net[1](self.net[0](batch[0]))
        self.manual_backward(cross_entropy(self.net[4](self.net[3](self.net[2](z))), batch[1]))


class Adversarial(Manual):
    """Two optimizers that take turns."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.critic = nn.Linear(FEATURES + CLASSES, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net, self.critic)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        generator, critic = self.optimizers()  # type: ignore[misc]
        for optimizer, sign in ((critic, 1), (generator, -1)):
            optimizer.zero_grad()
            self.manual_backward(sign * self.critic(torch.cat([batch[0], self.net(batch[0])], 1)).mean())
            optimizer.step()


class Without(Manual):
    def configure_optimizers(self) -> Any:
        return []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))


class Again(Manual):
    """A second loss of the same batch, after the first one's backward."""

    def backward_of(self, loss: Tensor) -> None:
        self.manual_backward(loss)
        self.manual_backward(self.net[2:](torch.ones(1, 8)).mean())


class Unheard(Manual):
    def backward_of(self, loss: Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Scattered, r"must not run training_step again.*put 'net.2' and the modules below it into one submodule"),
        (Adversarial, r"configure_optimizers gives 2 optimizers \(as a GAN does\)"),
        (Without, r"gives no optimizer; return one of the part above the cut"),
        (Again, r"calls manual_backward more than once"),
        (Unheard, r"stepped without self.manual_backward"),
    ],
)
def test_what_cannot_be_followed_is_refused(kind: type[Manual], message: str) -> None:
    module = kind(*mlp().net)
    with pytest.raises(ValueError, match=message):
        fit(module, hybrid())
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_pre_hooks for m in module.modules())
