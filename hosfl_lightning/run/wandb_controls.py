"""Controls in Weights & Biases: runs of their own, in the group of the run that they stand beside."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger


def join_group(loggers: Sequence[Logger]) -> None:
    """A run that has controls is in a group from its start, as W&B knows no other way: by its id, if none was given.

    Args:
        loggers: Before their first use. One that was given a run that has begun leaves it where it is.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb  # where it is needed, as Lightning does: it is slow to import

        if logger._experiment is None and wandb.run is None:
            given = logger._wandb_init
            logger._id = given["id"] = given.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            given["group"] = given.get("group") or os.environ.get("WANDB_RUN_GROUP") or given["id"]


@contextmanager
def control_loggers(loggers: Sequence[Logger], name: str, method: str) -> Iterator[list[WandbLogger]]:
    """For each logger of the run to W&B one to a new run: of its project, group, folder and mode, ended afterwards.

    The id is the run's and the control's name: a control that is run anew takes the place of what it was. In all else
    the run's own stays as it is, open and the one that ``wandb.run`` names.

    Args:
        loggers: The run's, in the process that writes.
        name: Of the control.
        method: Its class.
    """
    with ExitStack() as runs:
        made = []
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                run = wandb.init(**_settings(logger, name, method))
                made.append(WandbLogger(experiment=runs.enter_context(run)))
        yield made


def _settings(logger: WandbLogger, name: str, method: str) -> dict[str, Any]:
    run: Any = logger.experiment
    given = {key: value for key, value in logger._wandb_init.items() if value is not None}
    return given | {
        "project": run.project,
        "entity": run.entity or None,
        "mode": run.settings.mode,
        "group": run.group or run.id,
        "name": f"{run.name or run.id} {name}",
        "id": f"{run.id}-{re.sub(r'[^0-9A-Za-z_.-]', '-', name)}",
        "job_type": "control",
        "config": {"control": name, "control_of": run.id, "algorithm": method},
        "resume": None,
        "reinit": "create_new",
    }
