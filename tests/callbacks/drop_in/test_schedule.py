"""One policy in both callbacks: the rule's rate is that at the peak of the module's schedule, or constant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD as TorchSGD
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset

from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.callbacks.drop_in.schedule import Schedule
from hosfl_lightning.optim import SGD
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, Sequential, fit, loader, mlp, same_bits

pytestmark = LIGHTNING_WARNINGS
RATE = 0.5
CALLBACKS = [partial(HybridOrder, "net.2", SGD(lr=RATE)), partial(ZerothOrderTraining, SGD(lr=RATE))]
either = pytest.mark.parametrize("make", CALLBACKS, ids=["hybrid", "zeroth"])


class Scheduled(Sequential):
    def __init__(self, schedule: Callable[[Optimizer], LRScheduler], lr: float = 0.03, **config: Any) -> None:
        super().__init__(*mlp().net, lr=lr)
        self.schedule, self.config = schedule, {"interval": "step", **config}

    def configure_optimizers(self) -> Any:
        optimizer = TorchSGD(self.parameters(), lr=self.lr, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), **self.config}}


class Rates(Callback):
    """The rate of the module's optimizer in each step, and ours."""

    def __init__(self, order: Any) -> None:
        self.order, self.theirs, self.ours = order, [], []
        self._now: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        self.theirs.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_batch_end(self, *_: Any) -> None:
        self.ours.append(float(self.order.optimizers[0].param_groups[0]["lr"]))


def rates(module: Sequential, make: Any, **settings: Any) -> Rates:
    seen = Rates(make())
    fit(module, seen.order, seen, **({"max_epochs": 2} | settings))
    assert len(seen.ours) == len(seen.theirs) > 0
    return seen


def noam(step: int) -> float:
    """Of a base rate of 1, of which it reaches a hundredth."""
    return 0.01 * min((step + 1) / 3, (3 / (step + 1)) ** 0.5)


def warm_restarts(optimizer: Optimizer) -> LRScheduler:
    warm_up, restarts = LinearLR(optimizer, 1e-3, total_iters=2), CosineAnnealingWarmRestarts(optimizer, 2)
    return SequentialLR(optimizer, [warm_up, restarts], [2])


#: Schedule, the module's rate, and the peak.
SCHEDULES: dict[str, tuple[Callable[[Optimizer], LRScheduler], float, float]] = {
    "decays": (lambda o: StepLR(o, 2, 0.1), 0.03, 0.03),
    "cosine": (lambda o: CosineAnnealingLR(o, 8), 0.03, 0.03),
    "warm-up from 0": (lambda o: LambdaLR(o, lambda step: min(1.0, step / 4)), 0.03, 0.03),
    "warm-up and restarts": (warm_restarts, 0.03, 0.03),
    "one cycle": (lambda o: OneCycleLR(o, 0.2, total_steps=9), 0.03, 0.2),
    "triangles": (lambda o: CyclicLR(o, 0.01, 0.2, step_size_up=2), 0.03, 0.2),
    "triangles that never get there": (lambda o: CyclicLR(o, 0.01, 0.2, step_size_up=100), 0.03, 0.2),
    "far below its base": (lambda o: LambdaLR(o, noam), 1.0, 0.01),
}


@either
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rules_rate_is_that_at_the_peak(name: str, make: Any) -> None:
    schedule, lr, peak = SCHEDULES[name]
    seen = rates(Scheduled(schedule, lr), make)
    assert seen.ours == pytest.approx([RATE * lr / peak for lr in seen.theirs])
    assert len({*seen.theirs}) > 1
    if "never" not in name:
        assert max(seen.ours) == pytest.approx(RATE, rel=0.05)


@either
def test_a_schedule_of_epochs(make: Any) -> None:
    module = Scheduled(lambda o: LambdaLR(o, lambda epoch: [0.1, 1.0, 0.2, 5.0][epoch]), interval="epoch")
    seen = rates(module, make, max_epochs=3)
    assert seen.ours == pytest.approx([0.1 * RATE] * 4 + [RATE] * 4 + [0.2 * RATE] * 4)


@either
def test_a_constant_rate_on_request(make: Any) -> None:
    seen = rates(Scheduled(SCHEDULES["one cycle"][0]), partial(make, schedule="constant"))
    assert seen.ours == [RATE] * 8
    with pytest.raises(ValueError, match="schedule must be one of follow, constant, got 'cosine'"):
        make(schedule="cosine")


@either
def test_without_a_schedule_it_is_constant(make: Any) -> None:
    assert rates(mlp(), make).ours == [RATE] * 8


class Manual(Scheduled):
    """Steps optimizer and schedule by hand."""

    def __init__(self, schedule: Any, lr: float) -> None:
        super().__init__(schedule, lr, interval="epoch")  # which Lightning does not look at
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()
        schedule.step()


def test_a_schedule_that_is_stepped_by_hand() -> None:
    seen = rates(Manual(*SCHEDULES["far below its base"][:2]), CALLBACKS[0])
    assert seen.ours == pytest.approx([RATE * lr / 0.01 for lr in seen.theirs])


class WarmsUp(Sequential):
    """From nothing, written into the optimizer's step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = [0.0, 0.01, 0.02, 0.005][batch_idx]
        optimizer.step(closure=optimizer_closure)


@either
def test_a_rate_above_the_peak_is_the_peak_from_then_on(make: Any) -> None:
    seen = rates(WarmsUp(*mlp().net, lr=1e-6), make, max_epochs=1)
    assert seen.ours == pytest.approx([0.0, RATE, RATE, RATE / 4])


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from (row for row in loader().dataset)  # type: ignore[attr-defined]


@either
def test_only_without_a_known_end_is_the_peak_the_initial_rate(make: Any) -> None:
    endless = DataLoader(Endless(), batch_size=8)
    for settings, peak in (({"max_epochs": 2}, 1.0), ({"max_epochs": 2, "max_steps": 8}, 0.01)):
        seen = rates(Scheduled(*SCHEDULES["far below its base"][:2]), make, data=endless, **settings)
        assert seen.ours == pytest.approx([RATE * lr / peak for lr in seen.theirs])
    seen = rates(Scheduled(SCHEDULES["warm-up from 0"][0]), make, data=loader(), max_epochs=-1, max_steps=8)
    assert seen.ours == pytest.approx([RATE * lr / 0.03 for lr in seen.theirs])


class Bound(Scheduled):
    """Its schedule is a method, and its scheduler cannot be copied."""

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        configured["lr_scheduler"]["scheduler"].more = self.more()
        return configured

    def more(self) -> Any:
        yield


@either
def test_a_scheduler_that_cannot_be_copied_counts_from_the_initial_rate(make: Any) -> None:
    seen = rates(Bound(lambda o: LambdaLR(o, lambda step: 1 / (1 + step))), make)
    assert seen.ours == pytest.approx([RATE / (1 + step) for step in range(8)])


class OfTheModule(Scheduled):
    def __init__(self) -> None:
        super().__init__(lambda o: LambdaLR(o, self.factor))
        self.copied = 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the module was copied")

    def factor(self, step: int) -> float:
        return (step + 1) / 10


def test_looking_ahead_leaves_no_trace() -> None:
    module = OfTheModule()
    found: list[Any] = []

    class Look(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            before = {**scheduler.state_dict()}, [{**g} for g in trainer.optimizers[0].param_groups]
            found.extend(Schedule(trainer, pl_module, "follow").peaks)
            assert before == (scheduler.state_dict(), [{**g} for g in trainer.optimizers[0].param_groups])

    fit(module, Look(), max_epochs=2)
    assert found == pytest.approx([0.03 * 8 / 10])  # in the last step of the run


@either
def test_a_resumed_run_has_the_rates_of_one_that_was_never_stopped(make: Any, tmp_path: Path) -> None:
    whole, resumed = (Scheduled(SCHEDULES["far below its base"][0], 1.0) for _ in range(2))
    order, again = make(), Rates(make())
    seen = Rates(order)
    fit(whole, order, seen, ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}"),
        max_epochs=2, enable_checkpointing=True)  # fmt: skip
    fit(resumed, again.order, again, max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt")
    assert again.ours == seen.ours[4:]
    assert same_bits(whole, resumed)
    with pytest.raises(ValueError, match="was saved with schedule=follow, now it is constant"):
        fit(resumed, make(schedule="constant"), max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt")


def test_a_checkpoint_of_before_says_what_was_its_policy(tmp_path: Path) -> None:
    for make, was in zip(CALLBACKS, ("constant", "follow")):
        order = make()
        fit(mlp(), order)
        state = {name: value for name, value in order.state_dict().items() if name not in ("schedule", "peaks")}
        other = make()
        other.load_state_dict(state)
        assert other._restored["schedule"] == was


def test_of_several_groups_it_follows_the_one_with_the_first_parameter_below() -> None:
    class Groups(Sequential):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[2:].parameters()}, {"params": self.net[:2].parameters()}]
            optimizer = TorchSGD(groups, lr=self.lr)
            scheduler = LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1 / (1 + step)])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    seen = rates(Groups(*mlp().net), CALLBACKS[0], max_epochs=1)
    assert seen.theirs == [0.1] * 4
    assert seen.ours == pytest.approx([RATE / (1 + step) for step in range(4)])
    assert torch.isfinite(torch.tensor(seen.ours)).all()
