"""What crosses the cut: smashed data up, the multiplier down, and at the end of a round one update to everybody.

A client that sends what cannot be taken is refused by name, and the round goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from hosfl_lightning.aggregation import screen
from hosfl_lightning.algorithms.base import Runner
from hosfl_lightning.clients import Cohort
from hosfl_lightning.optim import Basis
from hosfl_lightning.wire import (
    CodedGradient,
    Multiplier,
    ProbedData,
    ProjectedGradients,
    SmashedData,
    Update,
    Weights,
    WireError,
)

M = TypeVar("M", SmashedData, ProbedData, ProjectedGradients, CodedGradient, Weights)


def taken(runner: Runner, message: M) -> list[M]:
    """What the server takes of a client's message: itself, or nothing, and the client is refused by name."""
    try:
        return [runner.transport.up(message)]
    except WireError as error:
        assert message.client is not None  # it came from one
        runner.refuse(message.client, str(error))
        return []


def answered(runner: Runner, answer: ProjectedGradients) -> list[ProjectedGradients]:
    """A client's answer goes up, in the codec of gradients; as the server knows it, or nothing."""
    if runner.codec.gradient == "fp32":
        return taken(runner, answer)
    packed = CodedGradient.pack(
        answer.round, answer.client, answer.basis, answer.coefficients, answer.num_terms, runner.codec.gradient,
        runner.seed,
    )  # fmt: skip
    return [ProjectedGradients(m.round, m.client, m.basis, m.unpack(), m.num_terms) for m in taken(runner, packed)]


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


def upload_probe(
    runner: Runner, cohort: Cohort, z: Tensor, inbox: Sequence[SmashedData], probe: int, side: int
) -> list[SmashedData]:
    """z of one side of a probe goes up, of each client that is still heard.

    Args:
        runner: Transport, codec and server.
        cohort: Whose z it is.
        z: ``(B, S, h)``.
        inbox: What the server holds of these clients: their labels and masks are not sent again.
        probe: Index of the direction.
        side: 0 for ``θ + μu``, 1 for ``θ − μu``.

    Returns:
        The same with the probe's z in place of the one before, of those whose z can be taken.
    """
    place = {k: (rows, width) for k, rows, width in zip(cohort.clients, cohort.rows, cohort.widths)}
    codec, probed = runner.codec.smashed_data, list[SmashedData]()
    for held in inbox:
        rows, width = place[held.client]
        packed = ProbedData.pack(held.round, held.client, probe, side, z[rows, :width], held.mask, codec, runner.seed)
        probed += [replace(held, z=arrived.z) for arrived in taken(runner, packed)]
    return [message for message in probed if _fits(runner, message)]


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


def conclude(
    runner: Runner,
    round: int,
    basis: Basis,
    own: list[ProjectedGradients],
    aggregate: Callable[[list[ProjectedGradients]], Update],
) -> Update:
    """Step 5: answers that no rule can use are refused, the others become one update, recorded and sent to everybody.

    Args:
        runner: Whose clients answered.
        round: The round.
        basis: In what they were asked to answer.
        own: The answers of this process.
        aggregate: Makes the update.

    Returns:
        The update as it arrives.

    Raises:
        TooFewClientsError: Too few answers are left.
    """
    answers, refused = screen(runner.transport.collect(own), round, basis)
    for client, reason in refused.items():
        runner.refuse(client, reason)
    runner.check_attendance(sum(answer.num_terms > 0 for answer in answers))
    return runner.publish(aggregate(answers))


def mean_loss(runner: Runner, update: Update, losses: Mapping[int, float]) -> Tensor:
    """``Σ_k w_k ℓ_k`` over the update's participants, 0-d, from this process's clients and the others'."""
    rows = runner.transport.in_client_order([[client, loss] for client, loss in losses.items()])
    told = {int(client): loss for client, loss in rows}
    return torch.tensor(sum(w * told[k] for k, w in zip(update.participants, update.weights) if w))


def _fits(runner: Runner, message: SmashedData) -> bool:
    reason = runner.server.module.objection(message)
    if reason is not None:
        runner.refuse(message.client, reason)
    return reason is None
