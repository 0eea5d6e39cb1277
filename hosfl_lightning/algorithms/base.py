"""The six steps of a round, shared by every method that cuts the model and returns λ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.aggregation import MEAN, AggregationRule, combine, screen
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.clients import Anchor, Client, Cohort
from hosfl_lightning.optim import SGD, Basis, UpdateRule
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.servers.server import Server
from hosfl_lightning.transport import InProcess
from hosfl_lightning.wire import Codecs, Multiplier, ProjectedGradients, SmashedData, Update, WireError

M = TypeVar("M", SmashedData, ProjectedGradients)


class TooFewClientsError(RuntimeError):
    """Fewer clients than ``trainer.min_clients`` have answered; neither half has moved."""


class Runner(Protocol):
    """What a round needs of whoever runs it: the server, the way to it, and the clients' device."""

    server: Server
    transport: InProcess
    codec: Codecs
    seed: int

    def refuse(self, client: int, reason: str) -> None:
        """Name and count a client whose message is not taken; the round goes on without it."""

    def check_attendance(self, answers: int) -> None:
        """Raise `TooFewClientsError` when so few answers make no round."""

    def publish(self, update: Update) -> Update:
        """Record the update, then send it to every client that is online; what they receive."""

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the clients' device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward; one context a step, since it keeps casts of the weights it saw."""


class Algorithm(ABC):
    """What a method does at steps 2 to 6; sampling, data, hooks, logging and checkpoints are the orchestrator's.

    Args:
        client_optimizer: The update rule on θ_c.
        client_scheduler: The schedule of its learning rate, stepped once a round; every update carries the rate it was
            made with.
        aggregation: The server's mean over the clients' answers; None: the weighted mean.
    """

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
    ) -> None:
        self.client_optimizer = client_optimizer if client_optimizer is not None else SGD()
        self.make_scheduler = client_scheduler
        self.aggregation = aggregation if aggregation is not None else MEAN
        self.client: Client
        self.client_schedule: Any | None = None

    @property
    def name(self) -> str:
        """As reported in the summary."""
        return type(self).__name__

    def configure_callbacks(self, given: list[Callback]) -> list[Callback]:
        """Callbacks the method needs beside those that were given.

        Raises:
            ValueError: A callback is a step that the method does not have.
        """
        for callback in given:
            if isinstance(callback, LagrangianUpdate | DimensionFreeAggregation):
                raise ValueError(f"trainer.callbacks: {self.name} has no step for {type(callback).__name__}; remove it")
        return []

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """Build the client; called once the module is on its device, with the callbacks of this run."""
        self.client = self.make_client(module, seed)
        if self.make_scheduler is not None:
            self.client_schedule = self.make_scheduler(self.client.optimizer)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on; plain values."""
        rule, mean = self.client_optimizer, self.aggregation
        return {
            "client_optimizer": type(rule).__name__,
            **{k: _plain(v) for k, v in asdict(rule).items()},
            "client_schedule": self.make_scheduler is not None,
            "aggregation": type(mean).__name__,
            **{f"aggregation.{k}": _plain(v) for k, v in asdict(mean).items()},
        }

    @abstractmethod
    def make_client(self, module: SplitModule, seed: int) -> Client:
        """The client of this method, over ``module.client_half`` and ``module.client_parameters``."""

    @abstractmethod
    def basis(self, round: int) -> Basis | None:
        """In what the clients answer in this round; None: they do not answer."""

    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        """Steps 2 to 6 for the sampled clients; returns the server's loss, 0-d.

        Both halves move at the very end, the server's after the update is recorded: a round that fails leaves no trace.

        Raises:
            TooFewClientsError: Too few clients sent something valid.
        """
        visits = [self.visit(runner, round, cohort) for cohort in cohorts]
        heard = sum(runner.server.num_terms(message) > 0 for visit in visits for message in visit.inbox)
        runner.check_attendance(runner.transport.count(heard))
        loss, multipliers = runner.server.backward([visit.inbox for visit in visits])
        basis = self.basis(round)
        if basis is None:
            runner.server.step()
            return loss
        own = [a for visit, group in zip(visits, multipliers) for a in self.respond(runner, round, visit, group, basis)]
        answers, refused = screen(runner.transport.collect(own), round, basis)
        for client, reason in refused.items():
            runner.refuse(client, reason)
        runner.check_attendance(sum(answer.num_terms > 0 for answer in answers))
        update = runner.publish(self.aggregate(answers))
        runner.server.step()
        self.client.apply(update)
        if self.client_schedule is not None:
            self.client_schedule.step()
        return loss

    def give_up(self) -> None:  # noqa: B027  # most methods have nothing to forget
        """The round has failed and will be tried again, or not at all: nothing of it is reported."""

    def visit(self, runner: Runner, round: int, cohort: Cohort) -> Visit:
        """Step 2: z, labels and mask of each client go up; padding and the joint batch's extra width stay behind."""
        batch = runner.to_device(cohort.batch)
        with runner.autocast():
            anchor = self.client.forward(batch, cohort.rows)
        inbox = []
        for k, rows, width in zip(cohort.clients, cohort.rows, cohort.widths):
            labels = cohort.batch["labels"][rows]
            mask = cohort.batch["attention_mask"][rows, :width].bool()
            labels = labels[:, :width] if labels.dim() > 1 else labels
            z = anchor.z[rows, :width]
            inbox += taken(runner, SmashedData.pack(round, k, z, labels, mask, runner.codec.smashed_data, runner.seed))
        return Visit(cohort, batch, anchor, [message for message in inbox if self._fits(runner, message)])

    def respond(
        self, runner: Runner, round: int, visit: Visit, multipliers: list[Multiplier], basis: Basis
    ) -> list[ProjectedGradients]:
        """Steps 3 and 4: λ comes down, each client's coefficients go up."""
        if not multipliers:  # all of this cohort were refused
            return []
        cohort, masks = visit.cohort, {message.client: message.mask for message in visit.inbox}
        multiplier = torch.zeros_like(visit.anchor.z)
        rows = dict(zip(cohort.clients, cohort.rows))
        for message in multipliers:
            mask = masks[message.client]
            multiplier[rows[message.client], : mask.shape[1]] = runner.transport.down(message).unpack(mask)
        with runner.autocast():
            values = self.answer(visit.batch, visit.anchor, multiplier, cohort, basis)
        answers: list[ProjectedGradients] = []
        for k, v, n in zip(cohort.clients, values.cpu(), cohort.num_terms):
            if k in masks:
                answers += taken(runner, ProjectedGradients(round, k, basis.describe(), v, n))
        return [answer for answer in answers if self._honest(runner, answer, visit.inbox)]

    def _fits(self, runner: Runner, message: SmashedData) -> bool:
        """Whether the server's half and loss can take what the client sent."""
        reason = runner.server.module.objection(message)
        if reason is not None:
            runner.refuse(message.client, reason)
        return reason is None

    def _honest(self, runner: Runner, answer: ProjectedGradients, inbox: list[SmashedData]) -> bool:
        """Whether the client claims as many loss terms as its labels have; one that claims more would own the mean."""
        counted = next(runner.server.num_terms(message) for message in inbox if message.client == answer.client)
        if answer.num_terms == counted:
            return True
        runner.refuse(answer.client, f"it claims {answer.num_terms} loss terms, its labels have {counted}")
        return False

    def answer(
        self, batch: dict[str, Tensor], anchor: Anchor, multiplier: Tensor, cohort: Cohort, basis: Basis
    ) -> Tensor:
        """Step 4: ``(K, basis.size)`` coefficients."""
        return self.client.answer(batch, anchor, multiplier, cohort.rows, basis)

    def aggregate(self, answers: list[ProjectedGradients]) -> Update:
        """Step 5: ``v̄`` and everything needed to apply it."""
        return combine(answers, self.client.optimizer, self.aggregation)

    def state_dict(self) -> dict[str, Any]:
        """The client's optimizer and its schedule."""
        schedule = self.client_schedule.state_dict() if self.client_schedule is not None else None
        return {"client_optimizer": self.client.optimizer.state_dict(), "client_schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.client.optimizer.load_state_dict(state["client_optimizer"])
        if self.client_schedule is not None:
            self.client_schedule.load_state_dict(state["client_schedule"])


@dataclass(frozen=True)
class Visit:
    """A cohort at step 2: what it keeps while it waits for λ, and what the server received of it."""

    cohort: Cohort
    batch: dict[str, Tensor]
    anchor: Anchor
    inbox: list[SmashedData]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def taken(runner: Runner, message: M) -> list[M]:
    """What the server takes of a client's message: itself, or nothing, and the client is refused by name."""
    try:
        return [runner.transport.up(message)]
    except WireError as error:
        runner.refuse(message.client, str(error))
        return []
