"""The server's optimizer and schedule, as its module configures them."""

from __future__ import annotations

from typing import Any

import torch

from hosfl_lightning.models import SplitModule


def configured(module: SplitModule) -> tuple[torch.optim.Optimizer, Any | None]:
    """The server's optimizer and its schedule, from what ``configure_optimizers`` may return.

    Raises:
        ValueError: More than one optimizer, or a schedule that is not stepped once a round.
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
