"""The server's optimizer and schedule, as its module configures them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from hosfl_lightning.models import SplitModule


def configured(module: SplitModule) -> tuple[torch.optim.Optimizer, Any | None]:
    """The server's optimizer and its schedule, from what ``configure_optimizers`` may return.

    Raises:
        ValueError: More than one optimizer, one that evaluates its loss again, or a schedule that is not stepped once a
            round.
    """
    config: Any = module.configure_optimizers()
    if isinstance(config, tuple) and len(config) == 2 and all(isinstance(part, list) for part in config):
        (optimizer, *others), schedules = config
    elif isinstance(config, dict):
        optimizer, others, schedules = config["optimizer"], [], [config.get("lr_scheduler")]
    else:
        optimizer, others, schedules = config, [], []
    schedule = schedules[0] if schedules else None
    settings = schedule if isinstance(schedule, dict) else {"scheduler": schedule}
    if others or not isinstance(optimizer, torch.optim.Optimizer) or len(schedules) > 1:
        raise ValueError(f"{type(module).__name__}.configure_optimizers: the server has one optimizer and one schedule")
    _check_closure(module, optimizer)
    if (
        isinstance(settings["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
        or settings.get("frequency", 1) != 1
        or settings.get("interval", "step") != "step"
    ):
        raise ValueError(
            "model.init_args.lr_scheduler: the server's schedule is stepped once a round, without a metric; "
            "use one with interval 'step' and frequency 1"
        )
    return optimizer, settings["scheduler"]


def check_length(schedule: Any, max_rounds: int, setting: str) -> None:
    """Refuse a schedule that ends before the run does.

    Raises:
        ValueError: Names its setting and that of the rounds.
    """
    steps = getattr(schedule, "total_steps", None)
    if isinstance(steps, int) and steps < max_rounds:
        raise ValueError(
            f"{setting}: {type(schedule).__name__} ends after total_steps={steps}, trainer.max_rounds is {max_rounds}; "
            "set total_steps to max_rounds, or fewer rounds"
        )


def _check_closure(module: SplitModule, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that calls for the loss again: λ is of one forward, and the clients wait for it."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needed = closure is not None and closure.default is inspect.Parameter.empty
    if not needed:  # or it says so when it steps (SAM): on a parameter that is nobody's
        try:
            with warnings.catch_warnings(action="ignore"):
                module.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).step()
        except Exception as error:
            needed = "closure" in str(error)
    if needed:
        raise ValueError(
            f"model.init_args.optimizer: {type(optimizer).__name__} evaluates the loss several times a step, by a "
            "closure, and a round has one forward of the server; take one that steps on one gradient (AdamW, SGD)"
        )
