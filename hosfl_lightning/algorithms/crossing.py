"""What crosses the cut: smashed data up, the multiplier down; a client that sends what cannot be taken is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hosfl_lightning.algorithms.base import Runner
from hosfl_lightning.clients import Cohort
from hosfl_lightning.wire import Multiplier, ProbedData, ProjectedGradients, SmashedData, Weights, WireError

M = TypeVar("M", SmashedData, ProbedData, ProjectedGradients, Weights)


def taken(runner: Runner, message: M) -> list[M]:
    """What the server takes of a client's message: itself, or nothing, and the client is refused by name."""
    try:
        return [runner.transport.up(message)]
    except WireError as error:
        assert message.client is not None  # it came from one
        runner.refuse(message.client, str(error))
        return []


def upload(runner: Runner, round: int, cohort: Cohort, z: Tensor, step: int = 0) -> list[SmashedData]:
    """z, labels and mask of each client go up; padding and the joint batch's extra width stay behind.

    Args:
        runner: Transport, codec and server.
        round: The round.
        cohort: Whose z it is.
        z: ``(B, S, h)``.
        step: The client's local step in the round.

    Returns:
        What the server's half and loss can take, in the order of the clients.
    """
    inbox = []
    for k, rows, width in zip(cohort.clients, cohort.rows, cohort.widths):
        labels = cohort.batch["labels"][rows]
        mask = cohort.batch["attention_mask"][rows, :width].bool()
        labels = labels[:, :width] if labels.dim() > 1 else labels
        packed = SmashedData.pack(round, k, z[rows, :width], labels, mask, runner.codec.smashed_data, runner.seed, step)
        inbox += taken(runner, packed)
    return [message for message in inbox if _fits(runner, message)]


def download(
    runner: Runner, cohort: Cohort, z: Tensor, inbox: Sequence[SmashedData], multipliers: Sequence[Multiplier]
) -> Tensor:
    """λ comes down to each client of a cohort that was heard: ``(B, S, h)`` like z, zero elsewhere."""
    masks = {message.client: message.mask for message in inbox}
    multiplier = torch.zeros_like(z)
    rows = dict(zip(cohort.clients, cohort.rows))
    for message in multipliers:
        mask = masks[message.client]
        multiplier[rows[message.client], : mask.shape[1]] = runner.transport.down(message).unpack(mask)
    return multiplier


def _fits(runner: Runner, message: SmashedData) -> bool:
    reason = runner.server.module.objection(message)
    if reason is not None:
        runner.refuse(message.client, reason)
    return reason is None
