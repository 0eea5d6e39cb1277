"""A callback's optimizer goes on from a checkpoint, or says why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from hosfl_lightning.arguments import plain
from hosfl_lightning.optim import UpdateRule, ZerothOrder


def resume(callback: str, optimizer: ZerothOrder, rule: UpdateRule, state: dict[str, Any], own: dict[str, Any]) -> None:
    """Load what a checkpoint holds; the learning rate is the rule's of today.

    Args:
        callback: Its name, for the message.
        optimizer: Changed in place.
        rule: Of the callback.
        state: ``own`` as it was saved, and ``optimizer``; empty: nothing to go on from.
        own: What the run must have in common with the one that was saved.

    Raises:
        ValueError: It has not.
    """
    if not state:
        return
    saved = dict(state["optimizer"]["param_groups"][0]) if state["optimizer"]["param_groups"] else {}
    rules = {f"rule.{name}": (value, saved.get(name, value)) for name, value in rule.hyper_parameters().items()}
    compared = {name: (value, state.get(name, value)) for name, value in own.items()} | rules
    for name, (value, before) in compared.items():
        # What an earlier version did not save cannot be compared; a tuple comes back as a list from some files.
        if plain(value) != plain(before) and name != "rule.lr":
            raise ValueError(f"ckpt_path: {callback} was saved with {name}={before}, now it is {value}")
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = rule.lr


def check_loaded(callback: Callback, trainer: Trainer, checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Of a run that goes on, before torch compares the sizes of its optimizer's groups.

    Args:
        callback: Which probes.
        trainer: Evaluations take any weights.
        checkpoint: The whole of it.
        own: Settings that decide what the module's optimizer trains.

    Raises:
        ValueError: It was written without the callback, or with others.
    """
    if trainer.state.fn is not TrainerFn.FITTING:
        return
    name, state = type(callback).__name__, checkpoint.get("callbacks", {}).get(callback.state_key)
    if state is None:
        raise ValueError(
            f"ckpt_path: the checkpoint was written without {name}, so there is no state of what it trains, and the "
            "module's optimizer has another; to begin anew from its weights: "
            'model.load_state_dict(torch.load(path)["state_dict"]), and fit without ckpt_path'
        )
    for setting, value in own.items():
        if state.get(setting, value) != value:
            raise ValueError(f"ckpt_path: {name} was saved with {setting}={state[setting]}, now it is {value}")
