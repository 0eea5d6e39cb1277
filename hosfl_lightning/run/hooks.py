"""Which Trainer hooks the orchestrator fires, and for whom."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.callbacks import (
    CommunicationMonitor,
    DimensionFreeAggregation,
    LagrangianUpdate,
    PeakMemoryMonitor,
    PrivacyMonitor,
    RoundProgressBar,
)
from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.parts import PartError
from hosfl_lightning.privacy import Privacy
from hosfl_lightning.run.stock_callbacks import check_stock
from hosfl_lightning.server.watching import alters_answers

#: Fired by the orchestrator, in Trainer's order and with Trainer's arguments.
FIRED = frozenset(
    """
    setup teardown on_fit_start on_fit_end on_train_start on_train_end on_train_epoch_start on_train_epoch_end
    on_train_batch_start on_train_batch_end on_before_zero_grad on_before_backward on_after_backward
    on_before_optimizer_step on_validation_start on_validation_end on_validation_epoch_start on_validation_epoch_end
    on_validation_batch_start on_validation_batch_end on_test_start on_test_end on_test_epoch_start on_test_epoch_end
    on_test_batch_start on_test_batch_end on_predict_start on_predict_end on_predict_epoch_start on_predict_epoch_end
    on_predict_batch_start on_predict_batch_end on_exception on_save_checkpoint on_load_checkpoint
    """.split()
)
#: A module that overrides one of these expects Trainer to call it; silence would change what it does.
REFUSED_MODULE_HOOKS = (
    "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "configure_gradient_clipping", "backward",
    "transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer", "configure_callbacks",
    "configure_model", "prepare_data", "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
    "on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad", "on_test_model_eval",
    "on_test_model_train", "on_predict_model_eval",
)  # fmt: skip
#: The same for the data; it sets up clients and loaders, nothing is moved or changed on the way.
REFUSED_DATA_HOOKS = (
    "transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer", "train_dataloader",
    "state_dict", "load_state_dict", "on_exception",
)  # fmt: skip
#: Hooks of callbacks that a module does not share.
CALLBACK_ONLY = ("on_exception",)


class HookError(TypeError):
    """A hook was overridden that the orchestrator never fires."""


def complete(
    given: list[Callback],
    algorithm: Algorithm,
    bar: bool,
    checkpointing: bool,
    privacy: Privacy | None = None,
    secure: bool = False,
) -> list[Callback]:
    """The callbacks of a run: those given, and those that every run has.

    Args:
        given: By the user.
        algorithm: What can be told of its rounds.
        bar: Add a progress bar where there is none.
        checkpointing: Add a ``ModelCheckpoint`` where there is none.
        privacy: Of what the clients answer; its cost is counted.
        secure: The server learns the sum of the answers alone.

    Raises:
        ValueError: Two of a kind, one that the method has no step for, or is not told what it needs, or one that waits
            for epochs.
    """
    for callback in given:
        if not isinstance(callback, Callback):
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise PartError(
                f"trainer.callbacks: {name} is no lightning.pytorch.Callback, made; give an instance of one"
            )
        needs = callback.needs if isinstance(callback, RoundCallback) else None
        if needs is not None and needs not in algorithm.tells:
            raise ValueError(
                f"trainer.callbacks: {algorithm.name} has no step for {type(callback).__name__}; remove it"
            )
        if secure and alters_answers(callback):
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} is told single answers, and with "
                "trainer.secure_aggregation the server sees their sum alone; remove it"
            )
        check_stock(callback)
    wanted: list[type[Callback]] = [PeakMemoryMonitor, CommunicationMonitor]
    if privacy is not None and privacy.of_answers:
        wanted.append(PrivacyMonitor)
    for step in (LagrangianUpdate, DimensionFreeAggregation):
        if step.needs in algorithm.tells:
            wanted.append(step)
            number = sum(isinstance(callback, step) for callback in given)
            if number > 1:
                raise ValueError(
                    f"trainer.callbacks holds {number} {step.__name__}; a round has one, remove the others"
                )
    added = [kind() for kind in wanted if not any(isinstance(callback, kind) for callback in given)]
    if bar and not any(isinstance(callback, ProgressBar) for callback in given):
        added.append(RoundProgressBar())
    if checkpointing and not any(isinstance(callback, ModelCheckpoint) for callback in given):
        added.append(ModelCheckpoint(filename="last", enable_version_counter=False))
    # As in Trainer: checkpoints last, so that they hold what the other callbacks did in the same hook.
    return sorted([*given, *added], key=lambda callback: isinstance(callback, ModelCheckpoint))


def check_hooks(callbacks: Sequence[Callback], module: LightningModule, data: LightningDataModule) -> None:
    """Refuse what would be silently ignored.

    Overrides in Lightning's own classes are exempt: what they hang on an unfired hook (the sanity check) Trainer may
    skip too.

    Raises:
        HookError: Names the class and the hook.
    """
    for callback in callbacks:
        for hook in _overridden(callback, Callback):
            if hook not in FIRED:
                raise HookError(
                    f"{type(callback).__name__} overrides {hook}, which the Orchestrator never calls; remove it"
                )
    for owner, base, hooks in (
        (module, LightningModule, REFUSED_MODULE_HOOKS),
        (data, LightningDataModule, REFUSED_DATA_HOOKS),
    ):
        for hook in hooks:
            if getattr(type(owner), hook) is not getattr(base, hook):
                raise HookError(
                    f"{type(owner).__name__} overrides {hook}, which the Orchestrator never calls; remove it"
                )


def fire(module: LightningModule, hook: str, **kwargs: Any) -> None:
    """Call the module's hook with those of the arguments that it takes; a callback's own hooks it does not have."""
    method = getattr(module, hook, None)
    if method is not None and hook not in CALLBACK_ONLY:
        names = _takes(getattr(method, "__func__", method))
        method(**{name: value for name, value in kwargs.items() if name in names})


@lru_cache(maxsize=256)
def _takes(function: Any) -> frozenset[str]:
    """The names of its arguments, read once: a round asks for three hooks a client."""
    return frozenset(inspect.signature(function).parameters)


def _overridden(instance: Any, base: type) -> list[str]:
    """Hooks of ``base`` that a class outside Lightning defines anew, or that a `LambdaCallback` was given."""
    hooks = [name for name in dir(base) if name.startswith("on_") or name in ("setup", "teardown")]
    owners = {name: next(cls for cls in type(instance).__mro__ if name in vars(cls)) for name in hooks}
    given = vars(instance)
    return [name for name, cls in owners.items() if name in given or not cls.__module__.startswith("lightning.")]
