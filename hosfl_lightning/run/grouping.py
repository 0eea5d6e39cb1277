"""How many of a round's clients run as one batch: what a group holds at once bounds the memory of a round."""

from __future__ import annotations

import torch

from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.run.face import TrainerFace

#: ``auto``: numbers in the smashed data of a group, 16 MiB of them in fp32; a server's graph is a few ten times that.
MOST_NUMBERS = 1 << 22
#: ``auto``: clients of a group at least, however large each is.
LEAST_CLIENTS = 16


def group_size(trainer: TrainerFace) -> int | None:
    """Of a round: of settings and shapes alone, so that a run that goes on elsewhere cuts its rounds alike.

    Args:
        trainer: Its data is set up.

    Returns:
        ``trainer.group_size``, or what ``auto`` makes of the first client's minibatch; None: one group.
    """
    settings, method, data = trainer.settings, trainer.algorithm, trainer.datamodule
    size, sampled = settings.group_size, trainer.sample_size
    if settings.simulation != "batched" or not (method.joint and method.grouped):
        return None
    if size == "auto" and sampled > LEAST_CLIENTS:
        with torch.random.fork_rng(devices=[]):  # of a `collate` that draws
            batch = Minibatches(data, trainer.lightning_module)([data.holders[0]], 0).batch
        numbers = batch["attention_mask"].numel() * trainer.lightning_module.client_half.hidden_size
        size = max(LEAST_CLIENTS, MOST_NUMBERS // numbers)
    return size if size != "auto" and size < sampled else None
