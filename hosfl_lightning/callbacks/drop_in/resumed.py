"""A callback's optimizer goes on from a checkpoint, or says why it cannot."""

from __future__ import annotations

from typing import Any

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
