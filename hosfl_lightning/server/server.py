"""The server's side of a round: its half in training, what it takes of its clients, and the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor

from hosfl_lightning.aggregation import screen
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.checks import smashed_objection
from hosfl_lightning.models.pretrained import seeded
from hosfl_lightning.optim import Basis, ZerothOrder
from hosfl_lightning.server.backprop import Backpropagation
from hosfl_lightning.server.call import Call
from hosfl_lightning.server.contract import counted, scalar_loss
from hosfl_lightning.server.inbox import Inbox, Received
from hosfl_lightning.server.middle import UShapedBackward
from hosfl_lightning.server.replica import Replica
from hosfl_lightning.server.tally import Counted, Tally
from hosfl_lightning.server.watching import RoundWatcher
from hosfl_lightning.wire import (
    Acknowledgement,
    CodedGradient,
    Message,
    Multiplier,
    ProjectedGradients,
    SecureKeys,
    SmashedData,
    Terms,
    UnlabelledData,
    Update,
)

M = TypeVar("M", bound=Message)


class TooFewClientsError(RuntimeError):
    """Fewer clients than ``trainer.min_clients`` have answered; neither half has moved."""


class Server:
    r"""Descends ``Σ_k w_k ℓ_k(f_s(z_k; θ_s), y_k)``, returns ``λ_k = ∂ℓ_k/∂z_k``, unweighted, and keeps the record.

    The clients of a group run as one batch: the mean over its terms is the weighted mean of its clients' means, so
    weights enter once. λ_k is what autograd leaves in ``z_k`` divided by ``w_k``. Gradients of several groups are
    summed in order. A step is `backward`, then `step`: one that fails between them leaves θ_s as it was. A round is one
    step, or several, and ends with `end_round`.

    Args:
        module: Whose ``training_step`` is the loss.
        fabric: Precision, device and backward.
        optimizer: Over θ_s.
        scheduler: Stepped once a round, or None.
        fleet: The clients; it names those that are refused.
        replica: The client half, moved by the same updates as everybody's.
        basis: Of a round; None: the method makes no update record.
        publish: Puts an update on record, durable on return, and completes it.
        fire: A Trainer hook.
        joint: The clients of a round run as one group; else each is one.
        group_size: As several groups, of at most so many; None: as one.
        min_clients: Valid answers that a round needs.
        gradient_clip_val: Largest 2-norm of the server's gradient, or None.
        terms: The clients'.
        seed: Of the adapters' dropout masks and of the multipliers' stochastic rounding.
        codec: In what λ travels.
        watchers: Told what happens in a round.
        secure_threshold: The share of a round's clients that open a secure sum; None: answers travel in the open.

    Attributes:
        call: The attempt of a round that is under way.
    """

    call: Call

    def __init__(
        self,
        module: SplitModule,
        fabric: Fabric,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        *,
        fleet: Fleet,
        replica: Replica,
        basis: Callable[[int], Basis | None],
        publish: Callable[[Update], Update],
        fire: Callable[..., None],
        terms: Terms,
        joint: bool,
        group_size: int | None = None,
        min_clients: int = 1,
        gradient_clip_val: float | None = None,
        seed: int = 0,
        codec: str = "fp32",
        watchers: Sequence[RoundWatcher] = (),
        secure_threshold: float | None = None,
    ) -> None:
        self.module, self.fabric, self.optimizer, self.scheduler = module, fabric, optimizer, scheduler
        self.fleet, self.replica, self.terms = fleet, replica, terms
        self.basis, self.publish, self.fire = basis, publish, fire
        self.joint, self.group_size = joint, group_size if joint else None
        self.min_clients, self.gradient_clip_val = min_clients, gradient_clip_val
        self.seed, self.codec, self.watchers, self.secure_threshold = seed, codec, watchers, secure_threshold

    @property
    def client_rule(self) -> ZerothOrder:
        """The rule that all clients apply, its learning rate now, and how many steps it has taken."""
        return self.replica.optimizer

    # ---- who is heard

    def require(self, answers: int) -> None:
        """Raise `TooFewClientsError` when so few answers make no round."""
        if answers < self.min_clients:
            raise TooFewClientsError(
                f"{answers} valid answer(s) of clients with a loss term, trainer.min_clients is {self.min_clients}"
            )

    def require_in(self, inbox: Inbox, tally: Tally) -> None:
        """The same of all groups of a step, at the last of them."""
        if not tally.awaited:
            self.require(tally.heard + self.fleet.processes.count(inbox.heard))

    def groups(self, requests: Mapping[int, M]) -> list[dict[int, M]]:
        """Requests of clients that run together, in their order."""
        asked, size = [*requests.items()], self.group_size or max(1, len(requests))
        return [dict(asked[begin : begin + size]) for begin in range(0, max(1, len(asked)), size)]

    def admit(self, messages: Sequence[Received], tally: Tally | None = None) -> Inbox:
        """Step 2: what the half and its loss can take, of all clients of the round, or of a group of them.

        Raises:
            TooFewClientsError: Too few clients have a loss term in it.
        """
        inbox = Inbox.of(self.fitting(messages), self._count, None if self.joint else self.fleet.own)
        self.require_in(inbox, tally or Tally())
        return inbox

    def admit_one(self, message: SmashedData) -> Inbox | None:
        """The same of one client alone; None: it is refused."""
        fitting = self.fitting([message])
        return Inbox.of(fitting, self._count) if fitting else None

    def fitting(self, messages: Sequence[Any]) -> list[Any]:
        """Those that the half and its loss can take; the clients of the others are refused."""
        taken = []
        for message in messages:
            with self.fabric.autocast():
                reason = self._objection(message)
            if reason is None:
                taken.append(message)
            else:
                self.fleet.refuse(message.client, reason)
        return taken

    def screen(
        self,
        answers: Sequence[ProjectedGradients | CodedGradient],
        inbox: Counted | None = None,
        bases: Callable[[int], Basis | None] | None = None,
    ) -> list[ProjectedGradients]:
        """Step 5: the answers of all processes that the rule can use; who sent another is refused.

        Args:
            answers: Of the clients of this process.
            inbox: Says how many loss terms each of them has; None: only they know.
            bases: In what each client was asked to answer; None: in that of the round's update.

        Raises:
            TooFewClientsError: Too few are left.
        """
        own = [answer for answer in map(uncoded, answers) if inbox is None or self.honest(answer, inbox)]
        for watcher in self.watchers:
            own = watcher.on_answers(own)
        gathered, one = self.fleet.gather(own), self.basis(self.call.round)
        asked = {
            answer.client: bases(answer.client) if bases else one and one.of_clients([answer.client])
            for answer in gathered
        }
        valid, refused = screen(gathered, self.call.round, asked)
        for client, reason in refused.items():
            self.fleet.refuse(client, reason)
        self.require(sum(answer.num_terms > 0 for answer in valid))
        return valid

    def acknowledged(self, answers: Sequence[Acknowledgement], inbox: Inbox) -> dict[int, int]:
        """Step 5 where nothing of the clients' steps travels: who counts, with its loss terms.

        Args:
            answers: Of the clients.
            inbox: Says how many loss terms each of them has; one without any does not count.

        Raises:
            TooFewClientsError: Too few are left.
        """
        for answer in answers:
            if not answer.moved:
                self.fleet.refuse(answer.client, "its own estimate has NaN or infinite values, so it has not moved")
        moved = [answer.client for answer in answers if answer.moved]
        counted = {client: n for client in moved if (n := inbox.num_terms[client])}
        self.require(len(counted))
        return counted

    def _objection(self, message: Received) -> str | None:
        kept = isinstance(message, UnlabelledData)
        if kept != (self.module.labels == "client"):
            return f"it {'keeps' if kept else 'sent'} its labels, and the run's are at the {self.module.labels}"
        if isinstance(message, UnlabelledData):
            return smashed_objection(message, self.module.client_half)
        return self.module.objection(message)

    def honest(self, answer: ProjectedGradients | SecureKeys, inbox: Counted) -> bool:
        """Whether the client claims as many loss terms as its labels have; one that claims more would own the mean."""
        counted = inbox.num_terms[answer.client]
        if answer.num_terms == counted:
            return True
        self.fleet.refuse(answer.client, f"it claims {answer.num_terms} loss terms, its labels have {counted}")
        return False

    def record(self, update: Update) -> Update:
        """Put the round's update on record before anything moves."""
        update = self.publish(update)
        for watcher in self.watchers:
            watcher.on_update(update)
        return update

    # ---- its half

    def backward(self, inbox: Inbox, tally: Tally | None = None) -> tuple[Tensor | None, dict[int, Multiplier]]:
        """Step 3: gradients and multipliers of the smashed data of a step; at least one client has a loss term.

        Args:
            inbox: The smashed data.
            tally: Of the groups before, whose gradients these are added to; None: they are of all clients.

        Returns:
            ``Σ_k w_k ℓ_k`` (0-d, detached; None where the clients keep it to themselves) and λ by client.
        """
        tally = tally if tally is not None else Tally()
        if not tally.num_terms:
            self.fire("on_before_zero_grad", optimizer=self.optimizer)
            self.optimizer.zero_grad()
        if self.module.labels == "client":
            loss, multipliers, inbox = UShapedBackward(self)(inbox, tally)
        else:
            loss, multipliers = Backpropagation(self)(inbox, tally)
        tally.add(inbox, loss)
        for watcher in self.watchers:
            watcher.on_multipliers(inbox, multipliers)
        return loss, multipliers

    @torch.no_grad()
    def loss(self, message: SmashedData) -> Tensor:
        """``ℓ_k(f_s(z_k; θ_s), y_k)``, 0-d fp64: a forward alone, without dropout."""
        z, labels, mask = message.unpack()
        with self.fabric.autocast():
            return scalar_loss(
                self.module, self.module.training_step(self.batch(z, labels, mask), message.round), graph=False
            ).double()

    def step(self) -> None:
        """One optimizer step on what `backward` has left."""
        for watcher in self.watchers:
            watcher.before_step()
        if self.gradient_clip_val is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.gradient_clip_val)
        self.fire("on_before_optimizer_step", optimizer=self.optimizer)
        self.optimizer.step()

    def end_round(self) -> None:
        """The learning rate of the next round."""
        if self.scheduler is not None:
            self.scheduler.step()

    def state(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Copies of θ_s and of the optimizer's state."""
        parameters = [p.detach().clone() for p in self.module.server_parameters.values()]
        return parameters, deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def put(self, parameters: Sequence[Tensor], optimizer: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for mine, given in zip(self.module.server_parameters.values(), parameters):
            mine.copy_(given)
        self.optimizer.load_state_dict(deepcopy(optimizer))

    @contextmanager
    def training(self, first: Received) -> Iterator[None]:
        """While it is open, forwards of a group have dropout and a graph; ``first`` is of its first client."""
        # Dropout masks are a function of (seed, round, step, group), so a resumed run draws the same ones.
        named = f"{self.seed}/{first.round}/{first.step}/{first.client}"
        seed = int.from_bytes(blake2b(named.encode(), digest_size=8).digest(), "little") >> 1
        random = seeded(seed, self.fabric.device)
        with self.module.dropout_active(), random, torch.enable_grad(), self.fabric.autocast():
            yield

    def _count(self, message: Received) -> int:
        if isinstance(message, UnlabelledData):
            return message.num_terms
        return counted(self.module, message.unpack_labels())

    def batch(self, z: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What ``training_step`` takes."""
        batch = {"z": z, "attention_mask": mask.long(), "labels": labels}
        return {name: tensor.to(self.fabric.device) for name, tensor in batch.items()}

    def multipliers(
        self, group: Sequence[Received], gradients: Sequence[Tensor], w: Sequence[float]
    ) -> Iterator[Multiplier]:
        """λ of each client of a group, from what backward has left at its z."""
        for message, gradient, weight in zip(group, gradients, w):
            # A client without a single loss term has weight 0 and λ = 0.
            multiplier = gradient / weight if weight else gradient
            yield Multiplier.pack(
                message.round, message.client, multiplier, message.mask, self.codec, self.seed, message.step,
                message.attempt,
            )  # fmt: skip


def uncoded(answer: ProjectedGradients | CodedGradient) -> ProjectedGradients:
    """A client's answer as the server knows it, whatever it travelled in."""
    if isinstance(answer, ProjectedGradients):
        return answer
    return ProjectedGradients(
        answer.round, answer.client, answer.basis, answer.unpack(), answer.num_terms, answer.attempt
    )


def loss_of(output: Any) -> Tensor:
    """The loss of what a ``training_step`` may return: a tensor, or a dictionary with ``loss``."""
    return output["loss"] if isinstance(output, dict) else output
