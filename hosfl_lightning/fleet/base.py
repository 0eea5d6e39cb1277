"""All that the server knows of its clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from hosfl_lightning.fleet.absentees import Returns
from hosfl_lightning.fleet.channel import Channel, Sent
from hosfl_lightning.fleet.processes import Processes
from hosfl_lightning.wire import (
    Message,
    Multiplier,
    ProbeRequest,
    RoundEnd,
    SmashedData,
    UnlabelledData,
    Update,
    WireError,
)


class Fleet(ABC):
    """The clients of a run, wherever they are: `ask` some, `tell` all.

    Args:
        channel: Carries and counts the messages.
        processes: Which other processes have a part in the server's work.

    Attributes:
        refused: Whose message of the present attempt was not taken, and why.
    """

    #: Whether the clients are only simulated, those that are away among them.
    simulated = True

    def __init__(self, channel: Channel, processes: Processes) -> None:
        self.channel, self.processes = channel, processes
        self.refused: dict[int, str] = {}
        self.own: list[int] = []

    def assemble(self, clients: Sequence[int]) -> None:
        """An attempt of a round begins with these clients, ascending; `own` are those that this process asks."""
        self.own = self.processes.own(clients)

    @abstractmethod
    def ask(self, requests: Mapping[int, Message], *expected: type[Message]) -> list[Any]:
        """Send each client its request and wait for the answers.

        Args:
            requests: By client.
            expected: The kinds that an answer may have.

        Returns:
            The answers that can be taken, in the order of the clients. What is no message, of another kind, round or
            attempt, or does not come is refused by name.
        """

    @abstractmethod
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        """Send everybody the same. The server's replica of the client half moves with them, once."""

    @abstractmethod
    def abandon(self) -> None:
        """The run breaks off: clients of this process drop what they hold of the round."""

    @property
    def connected(self) -> list[int]:
        """Of clients on other machines: who is there and up to date, ascending."""
        raise NotImplementedError("simulated clients are where `Availability` says")

    def figures(self) -> dict[str, float]:
        """Of clients on other machines: what there is to log of a round."""
        return {}

    def hold_out(self, round: int) -> Iterator[SmashedData]:
        """z of what clients on other machines hold out for validation, after so many rounds."""
        raise NotImplementedError("simulated clients hold nothing out: the data module has one validation set for all")

    def catches_up_with(self, records: Returns) -> None:  # noqa: B027
        """What clients on other machines that missed something are answered from."""

    def gather_quorum(self, round: int, asked: int) -> float:
        """Wait until enough clients are there for an attempt of a round; how many seconds. Simulated ones always are.

        Args:
            round: The one that is to begin.
            asked: How many it asks.
        """
        return 0.0

    def close(self, reason: str, over: bool) -> None:  # noqa: B027
        """No round comes any more: the run is ``over``, or its server stops and may come back."""

    def state_dict(self) -> dict[str, Any]:
        """What must be known of the clients when the run goes on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Continue from `state_dict`."""

    def gather(self, answers: list[Any]) -> list[Any]:
        """The answers that all processes have received."""
        return self.processes.collect(answers)

    def refuse(self, client: int, reason: str) -> None:
        """Name a client whose message is not taken; the round goes on without it."""
        self.refused[client] = reason

    def entries(self) -> list[Sent]:
        """What was sent since the round began, by all processes."""
        if type(self.processes) is Processes:  # there is nobody to tell
            return list(self.channel.ledger)
        told = self.processes.share([astuple(sent) for sent in self.channel.ledger])
        return [Sent(*entry) for part in told for entry in part]

    def take(self, request: Any, answer: Message, expected: Sequence[type[Message]]) -> list[Message]:
        """What the server takes of a client's answer: itself as it arrives, or nothing, and the client is refused."""
        try:
            message = self.channel.up(answer)
        except WireError as error:
            self.refuse(request.client, str(error))
            return []
        reason = objection(request, message, expected)
        if reason is None:
            return [message]
        self.refuse(request.client, reason)
        return []


def objection(request: Any, answer: Any, expected: Sequence[Any]) -> str | None:
    """Why an answer does not answer a request, in words; None: it does."""
    if type(answer) not in expected:
        return f"it sent a {answer.kind}, expected was {' or '.join(kind.kind for kind in expected)}"
    if answer.round != request.round:
        return f"its answer is for round {answer.round}, this is round {request.round}"
    if answer.attempt != request.attempt:
        return f"its answer is for attempt {answer.attempt} of the round, this is attempt {request.attempt}"
    if answer.client != request.client:
        return f"it answers for client {answer.client}"
    if isinstance(request, ProbeRequest) and (answer.probe, answer.side) != (request.probe, request.side):
        return f"it sent side {answer.side} of probe {answer.probe}, asked for was {request.side} of {request.probe}"
    least = getattr(request, "step", 0) + isinstance(request, Multiplier)  # λ ends a step
    if isinstance(answer, SmashedData | UnlabelledData) and answer.step < least:
        return f"its smashed data are of local step {answer.step}, this is step {least}"
    return None
