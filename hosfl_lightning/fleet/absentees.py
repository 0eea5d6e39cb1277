"""Simulated clients that are not up to date, and how they come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from hosfl_lightning.aggregation import apply_update
from hosfl_lightning.clients.catch_up import CatchUpError, State, client_state, replica_of, same_state
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.wire import CatchUpRequest, Snapshot, Update


@dataclass(frozen=True)
class Absence:
    """What an absent client holds: the state after ``version`` updates, the last of them made by ``incarnation``."""

    version: int
    incarnation: str


class Returns(Protocol):
    """The server's side of a return."""

    incarnation: str

    def answer(self, request: CatchUpRequest) -> Iterator[Update] | Snapshot | None:
        """The updates that the client missed, or a whole state; None: it missed nothing."""

    def maker(self, version: int, otherwise: str) -> str:
        """The server that made the last of the first ``version`` updates."""


@dataclass
class Absentees:
    """The clients that are not up to date, and the states at which they left.

    All clients that are up to date are bit-identical, so the simulation holds them as one, and those that left in the
    same round as one, too. What these do when they return is done to a copy of the state at which they left, which must
    then equal the others bit for bit.

    Args:
        optimizer: Of the clients that are up to date.
        server: What answers them.
        channel: Counts what is sent.

    Attributes:
        absences: What each absent client holds.
        states: By version, as long as an absent client holds it.
        chosen: Returns so far, by ``replay`` and ``snapshot``.
    """

    optimizer: ZerothOrder
    server: Returns
    channel: Channel
    absences: dict[int, Absence] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    chosen: Counter[str] = field(default_factory=Counter)

    def attend(self, round: int, online: Iterable[int], clients: int) -> None:
        """The clients online in this round are brought up to date; the others are away from now on.

        Args:
            round: The round, and so the number of updates that the others hold.
            online: Who is there.
            clients: ``N``, all of the run.

        Raises:
            CatchUpError: A returning client did not end bit-identical.
        """
        present = set(online)
        together: dict[Absence, list[int]] = {}
        for client in sorted(present & self.absences.keys()):
            together.setdefault(self.absences.pop(client), []).append(client)
        for absence, returning in together.items():
            self._bring_back(returning, absence, round)
        leaving = set(range(clients)) - present - self.absences.keys()
        if leaving and round not in self.states:
            self.states[round] = client_state(self.optimizer, copy=True)
        maker = self.server.maker(round, self.server.incarnation)
        self.absences |= dict.fromkeys(leaving, Absence(round, maker))
        held = {absence.version for absence in self.absences.values()}
        self.states = {version: state for version, state in self.states.items() if version in held}

    def _bring_back(self, clients: Sequence[int], absence: Absence, round: int) -> None:
        for client in clients:
            request = self.channel.up(CatchUpRequest(round, client, absence.version, absence.incarnation))
        answer = self.server.answer(request)  # which is the same for all of them
        if answer is None:
            return
        if isinstance(answer, Snapshot):
            for client in clients:
                self._take(self.channel.down(replace(answer, client=client)))
        else:
            self._replay(clients, absence.version, round, answer)
        self.chosen["snapshot" if isinstance(answer, Snapshot) else "replay"] += len(clients)

    def _replay(self, clients: Sequence[int], version: int, round: int, updates: Iterator[Update]) -> None:
        replica = replica_of(self.optimizer, self.states[version], version)
        for update in updates:
            apply_update(self.channel.down(update, receivers=len(clients)), replica)
        self._compare(replica, f"clients {clients} replayed {round - version} round(s) from {version} on and do")

    def _take(self, snapshot: Snapshot) -> None:
        replica = replica_of(self.optimizer, snapshot.tensors, snapshot.step)
        self._compare(replica, f"client {snapshot.client} took a snapshot and does")

    def _compare(self, replica: ZerothOrder, who: str) -> None:
        same = same_state(client_state(replica), client_state(self.optimizer)) and replica.steps == self.optimizer.steps
        if not same:
            raise CatchUpError(f"{who} not hold what the others hold")

    def state_dict(self) -> dict[str, Any]:
        """Who is away and at which state."""
        return {
            "absences": {client: [a.version, a.incarnation] for client, a in self.absences.items()},
            "states": {version: dict(state) for version, state in self.states.items()},
            "chosen": dict(self.chosen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.absences = {client: Absence(*absence) for client, absence in state["absences"].items()}
        self.states = dict(state["states"])
        self.chosen = Counter(state["chosen"])
