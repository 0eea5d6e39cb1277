"""The six steps of a round, shared by every method that cuts the model and returns λ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Protocol

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning.aggregation import combine
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.clients import Anchor, Client, Cohort
from hosfl_lightning.optim import SGD, Basis, UpdateRule
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.servers.server import Server
from hosfl_lightning.transport import InProcess
from hosfl_lightning.wire import Multiplier, ProjectedGradients, SmashedData, Update


class Runner(Protocol):
    """What a round needs of whoever runs it: the server, the way to it, and the clients' device."""

    server: Server
    transport: InProcess

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the clients' device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward; one context a step, since it keeps casts of the weights it saw."""


class Algorithm(ABC):
    """What a method does at steps 2 to 6; sampling, data, hooks, logging and checkpoints are the orchestrator's.

    Args:
        client_optimizer: The update rule on θ_c.
    """

    def __init__(self, client_optimizer: UpdateRule | None = None) -> None:
        self.client_optimizer = client_optimizer if client_optimizer is not None else SGD()
        self.client: Client

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

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on; plain values."""
        rule = self.client_optimizer
        return {"client_optimizer": type(rule).__name__, **{k: _plain(v) for k, v in asdict(rule).items()}}

    @abstractmethod
    def make_client(self, module: SplitModule, seed: int) -> Client:
        """The client of this method, over ``module.client_half`` and ``module.client_parameters``."""

    @abstractmethod
    def basis(self, round: int) -> Basis | None:
        """In what the clients answer in this round; None: they do not answer."""

    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        """Steps 2 to 6 for the sampled clients; returns the server's loss, 0-d."""
        batches = [runner.to_device(cohort.batch) for cohort in cohorts]
        with runner.autocast():
            anchors = [self.client.forward(batch, cohort.rows) for batch, cohort in zip(batches, cohorts)]
        inbox = [self.send(runner, round, cohort, anchor.z) for cohort, anchor in zip(cohorts, anchors)]
        loss, multipliers = runner.server.step(inbox)
        basis = self.basis(round)
        if basis is None:
            return loss
        answers = []
        for cohort, batch, anchor, group, sent in zip(cohorts, batches, anchors, multipliers, inbox):
            received = [runner.transport.down(message) for message in group]
            multiplier = unpack_multipliers(received, sent, anchor.z)
            with runner.autocast():
                values = self.answer(batch, anchor, multiplier, cohort, basis)
            answers += [
                runner.transport.up(ProjectedGradients(round, k, basis.describe(), v, n))
                for k, v, n in zip(cohort.clients, values.cpu(), cohort.num_terms)
            ]
        update = runner.transport.down(self.aggregate(answers), receivers=len(answers))
        self.client.apply(update.coefficients.to(loss.device), basis)
        return loss

    def send(self, runner: Runner, round: int, cohort: Cohort, z: Tensor) -> list[SmashedData]:
        """Step 2, up: each client's z, labels and mask; padding and the joint batch's extra width stay behind."""
        messages = []
        for k, rows, width in zip(cohort.clients, cohort.rows, cohort.widths):
            labels = cohort.batch["labels"][rows]
            mask = cohort.batch["attention_mask"][rows, :width].bool()
            labels = labels[:, :width] if labels.dim() > 1 else labels
            messages.append(runner.transport.up(SmashedData.pack(round, k, z[rows, :width], labels, mask)))
        return messages

    def answer(
        self, batch: dict[str, Tensor], anchor: Anchor, multiplier: Tensor, cohort: Cohort, basis: Basis
    ) -> Tensor:
        """Step 4: ``(K, basis.size)`` coefficients."""
        return self.client.answer(batch, anchor, multiplier, cohort.rows, basis)

    def aggregate(self, answers: list[ProjectedGradients]) -> Update:
        """Step 5: ``v̄ = Σ_k w_k v_k`` and everything needed to apply it."""
        return combine(answers, self.client.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The client's optimizer."""
        return {"client_optimizer": self.client.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.client.optimizer.load_state_dict(state["client_optimizer"])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def unpack_multipliers(received: list[Multiplier], sent: list[SmashedData], z: Tensor) -> Tensor:
    """Each client's λ in the place of its rows of the joint batch, zero at padding."""
    whole = torch.zeros_like(z)
    row = 0
    for multiplier, smashed in zip(received, sent):
        examples, width = smashed.mask.shape
        whole[row : row + examples, :width] = multiplier.unpack(smashed.mask)
        row += examples
    return whole
