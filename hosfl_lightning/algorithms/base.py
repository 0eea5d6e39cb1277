"""What the orchestrator needs of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, ClassVar, Literal, Protocol

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor, nn

from hosfl_lightning.aggregation import MEAN, AggregationRule
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.gradient_alignment import GradientAlignment
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.callbacks.peak_memory_monitor import Rehearse
from hosfl_lightning.clients import Client, Cohort
from hosfl_lightning.optim import SGD, Basis, UpdateRule
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.servers.server import Server
from hosfl_lightning.transport import InProcess
from hosfl_lightning.wire import Codecs, Update


class TooFewClientsError(RuntimeError):
    """Fewer clients than ``trainer.min_clients`` have answered; neither half has moved."""


class Runner(Protocol):
    """What a round needs of whoever runs it: the server, the way to it, and the clients' device and data."""

    server: Server
    transport: InProcess
    codec: Codecs
    seed: int

    def minibatch(self, client: int, step: int) -> Cohort:
        """One client alone, with the minibatch of its local step ``round · local_steps + s``."""

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
    """What a method does in a round; sampling, data, hooks, logging and checkpoints are the orchestrator's.

    Args:
        client_optimizer: The update rule on what the clients train.
        client_scheduler: The schedule of its learning rate, stepped once a round; every update carries the rate it was
            made with.
        aggregation: The server's mean over the clients' answers; None: the weighted mean.
    """

    #: What a client holds of the model: the layers before the cut, or all of it.
    client_holds: ClassVar[Literal["half", "whole"]] = "half"
    #: How the server trains its half: by backprop, by forwards alone, or not at all.
    server_order: ClassVar[Literal["first", "zeroth", "none"]] = "first"
    #: Whether it needs something to train at the clients.
    client_trains: ClassVar[bool] = True
    #: Whether the clients of a round do not depend on each other's steps, so that they may run as one batch.
    joint: ClassVar[bool] = True
    #: Whether `Codecs.gradient` applies to what a client sends.
    codes_gradient: ClassVar[bool] = False
    #: Whether a round makes an update record, which a client that was away replays.
    records: bool = True
    #: Minibatches, and steps, of a client in a round.
    local_steps: int = 1

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
            if isinstance(callback, LagrangianUpdate | DimensionFreeAggregation | GradientAlignment):
                raise ValueError(f"trainer.callbacks: {self.name} has no step for {type(callback).__name__}; remove it")
        return []

    def check(self, module: SplitModule) -> None:
        """Refuse a model with which the method cannot do what it is for; called before anything is built or written.

        Raises:
            ValueError: Names the setting and the fix.
        """
        if self.client_holds == "whole" and module.client_holds != "whole":
            raise ValueError(
                f"{self.name} trains the whole model at the clients, but model.init_args.client_holds is half (the "
                f"{module.cut} layer(s) before the cut); set it to whole, which gives the server's half to the clients"
            )
        if self.client_trains and not self.parameters(module):
            raise ValueError(
                f"{self.name} trains the clients, but with model.init_args.lora.client: null and no side adapter at "
                "them they have nothing to train; set lora.client or side, or take Frozen"
            )

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """Build the client; called once the module is on its device, with the callbacks of this run."""
        self.client = self.make_client(module, seed)
        if self.make_scheduler is not None:
            self.client_schedule = self.make_scheduler(self.client.optimizer)

    def parameters(self, module: SplitModule) -> dict[str, nn.Parameter]:
        """What the clients train, by name, in manifest order: the order numbers the random directions."""
        if self.client_holds == "half":
            return module.client_parameters
        halves = {"client_half": module.client_parameters, "server_half": module.server_parameters}
        return {f"{half}.{name}": p for half, named in halves.items() for name, p in named.items()}

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on; plain values."""
        rule, mean = self.client_optimizer, self.aggregation
        return {
            "client_optimizer": type(rule).__name__,
            **{k: plain(v) for k, v in asdict(rule).items()},
            "client_schedule": self.make_scheduler is not None,
            "aggregation": type(mean).__name__,
            **{f"aggregation.{k}": plain(v) for k, v in asdict(mean).items()},
            **({"local_steps": self.local_steps} if self.local_steps != 1 else {}),
        }

    @abstractmethod
    def make_client(self, module: SplitModule, seed: int) -> Client:
        """The client of this method, over what it holds of ``module``."""

    def basis(self, round: int) -> Basis | None:
        """In what the round's update record is expressed; None: the method makes none."""
        return None

    @abstractmethod
    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        """The round of the sampled clients; returns the mean training loss, 0-d.

        A round that fails leaves no trace.

        Raises:
            TooFewClientsError: Too few clients sent something valid.
        """

    @abstractmethod
    def rehearse(self, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int]) -> int:
        """One client's part of a round, with made-up answers of the server: what is measured before the first round.

        Args:
            batch: Of the cohort, on the client's device.
            cohort: One client.
            waiting: Called when the client waits for the server.

        Returns:
            What ``waiting`` said; 0 where a client never waits.
        """

    def rehearsals(self) -> list[tuple[Rehearse, float]]:
        """`rehearse` for every kind of round the method has, with its share of the rounds; the shares add up to 1."""
        return [(self.rehearse, 1.0)]

    def give_up(self) -> None:  # noqa: B027  # most methods have nothing to forget
        """The round has failed and will be tried again, or not at all: nothing of it is reported."""

    def end_round(self, runner: Runner) -> None:
        """The schedules take their step; the server's belongs to the optimizer that its backprop needs."""
        if self.server_order == "first":
            runner.server.end_round()
        if self.client_schedule is not None:
            self.client_schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """The client's optimizer and its schedule."""
        schedule = self.client_schedule.state_dict() if self.client_schedule is not None else None
        return {"client_optimizer": self.client.optimizer.state_dict(), "client_schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.client.optimizer.load_state_dict(state["client_optimizer"])
        if self.client_schedule is not None:
            self.client_schedule.load_state_dict(state["client_schedule"])


def plain(value: Any) -> Any:
    """A setting as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value
