"""The schedule of the module's optimizer, as a factor on the learning rate of what is trained by probes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

Policy = Literal["follow", "constant"]
POLICIES = ("follow", "constant")
#: Steps of a schedule that are looked ahead at most.
LIMIT = 100_000


def check_policy(policy: str) -> None:
    """One of those that there are.

    Raises:
        ValueError: Names the setting.
    """
    if policy not in POLICIES:
        raise ValueError(f"schedule must be one of {', '.join(POLICIES)}, got {policy!r}")


class Schedule:
    """``f_t = η_t / max η`` of each parameter group of the module's optimizers: 1 at the peak, and never above.

    The peak is what a copy of the schedulers reaches in the steps of the run, at most `LIMIT`, or the ``max_lr`` that
    they state (OneCycleLR, CyclicLR). Where that cannot be known (a run or an epoch without an end, a scheduler of
    another kind, ``lr_scheduler_step`` overridden), it is ``initial_lr``; a greater rate that comes later is the peak
    from then on. Without a scheduler it is the rate at the start, so a warm-up that is written by hand counts from its
    end only.

    Args:
        trainer: About to train.
        module: Its module.
        policy: ``follow`` it, or stay ``constant``: 1 for every group.
        peaks: Those that a checkpoint has; empty: they are looked for.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, policy: Policy, peaks: Sequence[float] = ()) -> None:
        self.policy = policy
        self.peaks = list(peaks)
        if policy == "follow" and not peaks:
            self.peaks = [peak for optimizer in trainer.optimizers for peak in _peaks(trainer, module, optimizer)]

    def factors(self, optimizer: Optimizer) -> list[float]:
        """``f_t`` of each group, for the rates that it has now."""
        if self.policy == "constant":
            return [1.0] * len(optimizer.param_groups)
        rates = [rate(group) for group in optimizer.param_groups]
        self.peaks = [max(peak, lr) for peak, lr in zip(self.peaks, rates, strict=True)]
        return [lr / peak if peak else 1.0 for lr, peak in zip(rates, self.peaks)]


def rate(group: dict[str, Any]) -> float:
    """The learning rate of a group now; 1 where it has none (Adafactor's own schedule)."""
    return 1.0 if group.get("lr") is None else float(group["lr"])


def _peaks(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> list[float]:
    configs = [c for c in trainer.lr_scheduler_configs if getattr(c.scheduler, "optimizer", None) is optimizer]
    try:
        found = _reached(trainer, module, optimizer, configs)
    except Exception:  # whatever a foreign scheduler raises when it is copied
        found = [float(group.get("initial_lr") or rate(group)) for group in optimizer.param_groups]
    stated = [_stated(configs, i, group) for i, group in enumerate(optimizer.param_groups)]
    return [max(pair) for pair in zip(found, stated)]


def _stated(configs: list[Any], number: int, group: dict[str, Any]) -> float:
    named = [float(c.scheduler.max_lrs[number]) for c in configs if hasattr(c.scheduler, "max_lrs")]
    return max([float(group.get("max_lr") or 0.0), *named])


def _reached(trainer: Trainer, module: LightningModule, optimizer: Optimizer, configs: list[Any]) -> list[float]:
    """The greatest rate of each group in the steps that are to come.

    Raises:
        ValueError: They have no end, or step in a way of the module's own.
        Exception: What a scheduler raises that cannot be copied.
    """
    steps = trainer.estimated_stepping_batches
    configs = [c for c in configs if not c.reduce_on_plateau]  # which needs what it monitors, and only lowers
    if configs and (not 0 < steps < float("inf") or is_overridden("lr_scheduler_step", module)):
        raise ValueError("the schedule cannot be looked ahead")
    groups = [
        {"params": [torch.zeros(1)], **{name: copy.copy(value) for name, value in group.items() if name != "params"}}
        for group in optimizer.param_groups
    ]
    stand_in = Optimizer(groups, dict(optimizer.defaults))
    # Not copied: the parameters, and what a schedule written as a method of the module is bound to.
    memo: dict[int, Any] = {id(optimizer): stand_in, id(module): module, id(trainer): trainer}
    schedulers = [copy.deepcopy(config.scheduler, memo) for config in configs]
    best = [rate(group) for group in stand_in.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a step before the optimizer's
        for due in _due(trainer, module, configs, min(int(steps), LIMIT)) if configs else ():
            try:
                for number in due:
                    schedulers[number].step()
            except ValueError:  # OneCycleLR has no step after its last
                break
            best = [max(peak, rate(group)) for peak, group in zip(best, stand_in.param_groups)]
    return best


def _due(trainer: Trainer, module: LightningModule, configs: list[Any], steps: int) -> Iterator[list[int]]:
    """Numbers of the schedulers that step after each step of the optimizer but the last."""
    epoch, batches = steps, trainer.num_training_batches
    if batches < float("inf"):
        epoch = max(1, min(-(-int(batches) // trainer.accumulate_grad_batches), steps))
    each = [config.interval == "step" or not module.automatic_optimization for config in configs]
    for step in range(1, steps):
        counts = [step if every else step // epoch * (step % epoch == 0) for every in each]
        yield [i for i, count in enumerate(counts) if count and count % (configs[i].frequency or 1) == 0]
