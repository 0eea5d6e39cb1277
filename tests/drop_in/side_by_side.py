"""A project trained with our callback and without it: what a bystander sees of both, and what must not differ."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torchmetrics import Metric

#: What `HybridOrder` logs, and nothing else.
CLIENT_KEYS = {f"client/{name}" for name in ("multiplier_norm", "lagrangian_term", "projected_gradient_rms", "lr")}
#: What `ZerothOrderTraining` logs.
ZEROTH_ORDER_KEYS = {"zeroth_order/projected_gradient_rms", "zeroth_order/lr"}
#: What Lightning says to small runs, and asks of torch.
QUIET_WARNINGS = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "log_every_n_steps": 1, "num_sanity_val_steps": 0,
}  # fmt: skip


class Bystander(Callback):
    """Sees what every other callback of the project may see."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.logged: set[str] = set()
        self.losses: list[list[float]] = []
        self.random_states: list[str] = []
        self.updates: list[dict[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if (name.startswith("on_") and name != "on_save_checkpoint") or name in ("setup", "teardown"):
            self.hooks.append(name)
        return super().__getattribute__(name)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.append([])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer, pl_module)
        self.losses[-1].append(float(trainer.callback_metrics["train/loss"]))
        self.random_states.append(random_state())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Of its own: which epoch a ModelCheckpoint finds best depends on the weights.
        trainer.save_checkpoint(checkpoint_of(trainer))  # written whole; read with weights_only=True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.logged |= {*trainer.callback_metrics, *trainer.logged_metrics}
        self.updates.append({n: m.update_count for n, m in pl_module.named_modules() if isinstance(m, Metric)})


def checkpoint_of(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "bystander.ckpt"


class Outcome:
    """A run that has ended.

    Args:
        trainer: Its Trainer, one of whose callbacks is a `Bystander`.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.seen = next(c for c in callbacks if isinstance(c, Bystander))
        self.ours = {c.state_key for c in callbacks if type(c).__module__.startswith("hosfl_lightning.")}
        self.trainer, self.module = trainer, trainer.lightning_module
        self.checkpoint_path = checkpoint_of(trainer)
        self.checkpoint: dict[str, Any] = torch.load(self.checkpoint_path, weights_only=True)

    def epoch_loss(self, epoch: int) -> float:
        """Mean training loss of an epoch, before each step."""
        return mean(self.seen.losses[epoch])

    @property
    def start(self) -> float:
        """Training loss of the first batch."""
        return self.seen.losses[0][0]


def fit(module: L.LightningModule, *data: Any, callbacks: Sequence[Callback], **settings: Any) -> Outcome:
    """As the project would, with a bystander."""
    trainer = L.Trainer(**(QUIET | {"callbacks": [Bystander(), *callbacks]} | settings))
    trainer.fit(module, *data)
    return Outcome(trainer)


def assert_only_added(plain: Outcome, ours: Outcome, keys: set[str]) -> None:
    """The callback's own keys and its own entry in the checkpoint came in; all else is as it was without it."""
    assert ours.seen.hooks == plain.seen.hooks
    assert ours.seen.logged - plain.seen.logged == keys
    assert plain.seen.logged <= ours.seen.logged
    assert ours.seen.updates == plain.seen.updates
    assert ours.seen.random_states == plain.seen.random_states
    # Central differences have the module log its loss at θ + μu.
    assert ours.start == pytest.approx(plain.start, rel=1e-3 if keys == ZEROTH_ORDER_KEYS else 0, abs=0)
    assert ours.trainer.global_step == plain.trainer.global_step
    assert_checkpoints_agree(plain, ours)
    assert left_behind(ours) == left_behind(plain)


def assert_checkpoints_agree(plain: Outcome, ours: Outcome) -> None:
    """But for the weights, what optimizers keep of them, and one more callback."""
    theirs, others = dict(plain.checkpoint), dict(ours.checkpoint)
    assert list(others) == list(theirs)
    assert list(others.pop("state_dict")) == list(theirs.pop("state_dict"))
    assert set(others.pop("callbacks")) - set(theirs.pop("callbacks")) == ours.ours
    schedules = [[group["lr"] for group in c.pop("optimizer_states")[0]["param_groups"]] for c in (theirs, others)]
    assert schedules[0] == schedules[1]
    for schedule in (*theirs["lr_schedulers"], *others["lr_schedulers"]):
        schedule.pop("best", None)  # a loss
    for name in ("loops", "lr_schedulers", "hyper_parameters", "global_step", "epoch"):
        assert others.get(name) == theirs.get(name), name


def left_behind(run: Outcome) -> dict[str, Any]:
    """Of module, optimizer and strategy, what a callback could forget to undo."""
    left: dict[str, Any] = {n: p.requires_grad for n, p in run.module.named_parameters()}
    for name, module in run.module.named_modules():
        left[f"{name}()"] = (module.training, set(vars(module)), *(len(hooks) for hooks in hooks_of(module)))
    for optimizer in run.trainer.optimizers:
        left[type(optimizer).__name__] = len(optimizer._optimizer_step_post_hooks)
    left["strategy"] = set(vars(run.trainer.strategy))
    left["accumulation hooks"] = [len(p._post_accumulate_grad_hooks or {}) for p in run.module.parameters()]
    return left


def hooks_of(module: nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name.endswith("_hooks")]


def random_state() -> str:
    """Of Python, numpy and torch."""
    numpys: Any = np.random.get_state()  # noqa: NPY002 - the user's
    states = (random.getstate(), numpys[1].tobytes(), torch.get_rng_state().numpy().tobytes())
    return hashlib.sha256(repr(states).encode()).hexdigest()


def assert_learns(ours: Outcome, frozen: Outcome, margin: float) -> None:
    """The loss falls from its start, and below that of the same callback with a learning rate of 0."""
    assert ours.start == frozen.start
    assert ours.epoch_loss(-1) < frozen.epoch_loss(-1) - margin
    assert ours.epoch_loss(-1) < ours.start - margin
