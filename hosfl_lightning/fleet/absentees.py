"""Simulated clients that are not up to date, and how they come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hosfl_lightning.aggregation import apply_update
from hosfl_lightning.availability import among
from hosfl_lightning.clients.catch_up import CatchUpError, State, client_state, replica_of, same_state
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.wire import CatchUpRequest, Message, Snapshot, Update

#: Returns of one kind, from which on their messages are counted, not made.
MANY = 100


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
        away: The absent clients, ``(n,)`` int64 ascending, by what they hold.
        states: By version, as long as an absent client holds it.
        chosen: Returns so far, by ``replay`` and ``snapshot``.
    """

    optimizer: ZerothOrder
    server: Returns
    channel: Channel
    away: dict[Absence, Tensor] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    chosen: Counter[str] = field(default_factory=Counter)

    @property
    def absences(self) -> dict[int, Absence]:
        """What each absent client holds."""
        return {client: absence for absence, clients in self.away.items() for client in clients.tolist()}

    def strand(self, clients: Sequence[int] | Tensor, absence: Absence) -> None:
        """These hold that, whatever they held before."""
        mine = torch.as_tensor(clients, dtype=torch.int64, device="cpu").unique()
        left = {held: ids[~torch.isin(ids, mine)] for held, ids in self.away.items() if held != absence}
        mine = torch.cat([mine, self.away.get(absence, mine[:0])]).unique()
        self.away = {held: ids for held, ids in {**left, absence: mine}.items() if len(ids)}

    def attend(self, round: int, online: Sequence[int], clients: int) -> None:
        """The clients online in this round are brought up to date; the others are away from now on.

        Args:
            round: The round, and so the number of updates that the others hold.
            online: Who is there.
            clients: ``N``, all of the run.

        Raises:
            CatchUpError: A returning client did not end bit-identical.
        """
        present = among(online, clients)
        leaving = ~present
        for absence, ids in [*self.away.items()]:
            leaving[ids] = False
            back = present[ids]
            if not back.any():
                continue
            self.away[absence] = ids[~back]
            self._bring_back(ids[back].tolist(), absence, round)
        if leaving.any():
            if round not in self.states:
                self.states[round] = client_state(self.optimizer, copy=True)
            self.strand(leaving.nonzero().flatten(), Absence(round, self.server.maker(round, self.server.incarnation)))
        self.away = {absence: ids for absence, ids in self.away.items() if len(ids)}
        held = {absence.version for absence in self.away}
        self.states = {version: state for version, state in self.states.items() if version in held}

    def _bring_back(self, clients: list[int], absence: Absence, round: int) -> None:
        request = CatchUpRequest(round, clients[0], absence.version, absence.incarnation)
        heard = [self.channel.up(replace(request, client=client)) for client in self._told(clients)]
        self._count(heard[-1], "up", len(clients) - len(heard))
        answer = self.server.answer(heard[-1])  # which is the same for all of them
        if answer is None:
            return
        if isinstance(answer, Snapshot):
            for client in self._told(clients):
                sent = self.channel.down(replace(answer, client=client))
                self._take(sent)
            self._count(sent, "down", len(clients) - len(heard))
        else:
            self._replay(clients, absence.version, round, answer)
        self.chosen["snapshot" if isinstance(answer, Snapshot) else "replay"] += len(clients)

    def _told(self, clients: list[int]) -> list[int]:
        """Whose messages are made: all, unless there are many that nobody looks into; then one is as long as any."""
        return clients if len(clients) < MANY or self.channel.serialize or self.channel.taps else clients[:1]

    def _count(self, like: Message, direction: str, times: int) -> None:
        if times:
            self.channel.count(like, direction, self.channel.ledger[-1].bytes, times)

    def _replay(self, clients: Sequence[int], version: int, round: int, updates: Iterator[Update]) -> None:
        replica = replica_of(self.optimizer, self.states[version], version)
        for update in updates:
            apply_update(self.channel.down(update, receivers=len(clients)), replica)
        self._compare(replica, f"{_named(clients)} replayed {round - version} round(s) from {version} on and do")

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
            "absences": [[a.version, a.incarnation, clients] for a, clients in self.away.items()],
            "states": {version: dict(state) for version, state in self.states.items()},
            "chosen": dict(self.chosen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        held, self.away = state["absences"], {}
        if isinstance(held, dict):  # of an earlier version, client by client
            held = [[*absence, torch.tensor([client])] for client, absence in held.items()]
        for version, incarnation, clients in held:
            self.strand(clients, Absence(version, incarnation))
        self.states = dict(state["states"])
        self.chosen = Counter(state["chosen"])


def _named(clients: Sequence[int]) -> str:
    return f"clients {clients[:5]}" + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")
