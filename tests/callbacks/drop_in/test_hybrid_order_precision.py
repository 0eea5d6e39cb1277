"""HybridOrder in low precision: probes in the step's, and what a GradScaler scales and skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from tests.callbacks.drop_in.plain_modules import (
    CLASSES,
    LIGHTNING_WARNINGS,
    Sequential,
    distance,
    fit,
    hybrid,
    loader,
    mlp,
    same_bits,
)

pytestmark = LIGHTNING_WARNINGS


def half(init_scale: float = 2.0**10) -> MixedPrecision:
    """fp16 on the CPU; ``precision="16-mixed"`` alone would become bf16 there."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


def coarse(**kwargs: Any) -> HybridOrder:
    """Probes that low precision feels."""
    return hybrid(mu=0.03, estimator="central", **kwargs)


@pytest.mark.parametrize(("settings", "dtype"), [({"precision": "bf16-mixed"}, torch.bfloat16), ({}, torch.float16)])
def test_low_precision_agrees_with_fp32(settings: dict[str, Any], dtype: torch.dtype) -> None:
    narrow, wide, start = mlp(), mlp(), mlp()
    dtypes: list[torch.dtype] = []
    narrow.net[0].register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    trainer = fit(narrow, coarse(), max_steps=2, **(settings or {"plugins": half()}))
    reference = fit(wide, coarse(), max_steps=2)
    assert distance(narrow.net[0], wide.net[0]) < 0.2 * distance(wide.net[0], start.net[0])
    assert set(dtypes) == {dtype}  # probes run in the precision of the step
    norms = [float(t.callback_metrics["client/multiplier_norm"]) for t in (trainer, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=0.01)  # of the loss's λ, whatever the scale


def test_the_scale_does_not_matter() -> None:
    small, large = mlp(), mlp()
    fit(small, coarse(), plugins=half(2.0**4), gradient_clip_val=1.0)
    fit(large, coarse(), plugins=half(2.0**10), gradient_clip_val=1.0)
    assert distance(small, mlp()) > 1e-2
    assert distance(small, large) < 1e-4


class Counted(Sequential):
    """Adam, whose state tells how often it stepped."""

    fused = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net[2:].parameters(), lr=0.01, fused=self.fused)


class Fused(Counted):
    """Adam that unscales, and skips, by itself."""

    fused = True


@pytest.mark.parametrize("kind", [Counted, Fused])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_the_scaler_skips_is_skipped_below_too(kind: type[Counted], accumulated: int) -> None:
    order, module = coarse(), kind(*mlp().net)
    trainer = fit(module, order, plugins=half(2.0**24), max_epochs=5, accumulate_grad_batches=accumulated)
    state = trainer.optimizers[0].state[module.net[2].weight]
    assert order._client.optimizer.steps == int(state["step"]) < trainer.global_step  # type: ignore[union-attr]
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_skipped_step_leaves_nothing_to_the_next_one() -> None:
    """The second batch alone, or after one whose gradient above the cut overflows."""
    after, alone = mlp(), mlp()
    calls: list[int] = []

    def overflow(gradient: Tensor) -> Tensor:
        calls.append(1)
        return torch.full_like(gradient, torch.inf) if len(calls) == 1 else gradient

    after.net[2].weight.register_hook(overflow)
    both = loader(16)
    second = DataLoader(Subset(both.dataset, range(16, 32)), 16)
    fit(after, coarse(), plugins=half(2.0**11), data=both)
    fit(alone, coarse(), plugins=half(2.0**10), data=second)
    assert distance(alone, mlp()) > 1e-2
    assert same_bits(after, alone)


class Steep(nn.Module):
    """Enlarges its small input, and by the chain rule λ."""

    def forward(self, z: Tensor) -> Tensor:
        return 4096 * z


class Small(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z / 4096


class Scales(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.precision_plugin.scaler.get_scale())


def test_a_multiplier_that_overflows_alone_lowers_the_scale() -> None:
    """As the gradient below would have done."""
    torch.manual_seed(0)
    below = [nn.Linear(6, 8), nn.Tanh(), Small()]
    module, order, scales = Sequential(*below, Steep(), nn.Linear(8, CLASSES)), coarse_at("net.3"), Scales()
    before = module.net[4].weight.detach().clone()
    fit(module, order, scales, plugins=half(2.0**12), max_steps=1)
    assert scales.seen == [2.0**11]
    assert order._client.optimizer.steps == 0  # type: ignore[union-attr]
    assert torch.equal(module.net[4].weight, before)  # the whole step is skipped
    fit(module, order, scales, plugins=half(2.0**12), max_epochs=3)
    assert 0 < order._client.optimizer.steps < 12  # type: ignore[union-attr]


def coarse_at(cut: str) -> HybridOrder:
    return hybrid(cut, mu=0.03, estimator="central")


def test_verifying_waits_for_a_finite_multiplier() -> None:
    verified, plain = mlp(), mlp()
    order = coarse()
    fit(verified, order, plugins=half(2.0**24), max_epochs=5)
    fit(plain, coarse(verify=False), plugins=half(2.0**24), max_epochs=5)
    assert not order.lower.unverified
    assert same_bits(verified, plain)


def test_verifying_waits_for_finite_gradients_below() -> None:
    """λ fits into fp16 from the start, the weight's gradient, with its large inputs, at a lower scale."""
    torch.manual_seed(0)
    module = Sequential(Steep(), nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES))
    module.net[1].weight.data /= 4096
    order, scales = hybrid("net.2", lr=1e-9), Scales()
    before = module.net[3].weight.detach().clone()
    fit(module, order, scales, plugins=half(2.0**13), max_steps=1)
    assert scales.seen == [2.0**12]
    assert order.lower.unverified
    assert order._client.optimizer.steps == 0  # type: ignore[union-attr]
    assert torch.equal(module.net[3].weight, before)
    fit(module, order, plugins=half(2.0**13), max_epochs=3)
    assert not order.lower.unverified
