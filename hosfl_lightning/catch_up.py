"""Clients that missed updates and come back: they replay the records they missed, or take a snapshot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hosfl_lightning.aggregation import apply_update, recorded
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.replay import ReplayLog
from hosfl_lightning.transport import InProcess
from hosfl_lightning.wire import CatchUpRequest, Snapshot, Update, encoded_size

State = dict[str, Tensor]
#: Seconds to read, check and decode one record on one core, whatever its size: see benchmarks/replay.py.
SECONDS_PER_RECORD = 2e-3
#: Seconds to add one element of one direction on one core: see benchmarks/directions.py.
SECONDS_PER_ELEMENT = {"rademacher": 0.6e-9, "gauss16": 5.3e-9}


class CatchUpError(RuntimeError):
    """A client that came back does not hold what the others hold."""


@dataclass
class CatchUp:
    r"""A client that holds the state after ``v`` updates returns in round ``r``.

    ::

        replay    r − v records of the log      seconds = bytes / bandwidth + Σ (fixed + P · d_c · (seconds an element))
        snapshot  θ_c and the optimizer's state seconds = bytes / bandwidth

    ``auto`` takes what needs fewer seconds. The estimate is a function of sizes alone, so a run that is repeated
    chooses alike. A client whose last update is not in the server's history (the server came back on other hardware,
    from an earlier checkpoint) is always sent a snapshot, with the reason.

    Args:
        policy: ``auto``, ``replay`` or ``snapshot``.
        bandwidth: Of a client's line, bytes a second.

    Raises:
        ValueError: A setting out of range.
    """

    policy: Literal["auto", "replay", "snapshot"] = "auto"
    bandwidth: float = 1e6

    def __post_init__(self) -> None:
        if self.policy not in ("auto", "replay", "snapshot"):
            raise ValueError(f"trainer.catch_up.policy must be auto, replay or snapshot, got {self.policy!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"trainer.catch_up.bandwidth must be > 0 bytes a second, got {self.bandwidth}")

    def objection(self, record_bytes: int, compute_seconds: float, snapshot_bytes: int) -> str | None:
        """Why a snapshot and not the records, in words; None: the records."""
        if self.policy != "auto":
            return "the policy is snapshot" if self.policy == "snapshot" else None
        replay, snapshot = record_bytes / self.bandwidth + compute_seconds, snapshot_bytes / self.bandwidth
        return f"the records take {replay:.3g} s, a snapshot {snapshot:.3g} s" if snapshot < replay else None


@dataclass(frozen=True)
class Absence:
    """What an absent client holds: the state after ``version`` updates, the last of them made by ``incarnation``."""

    version: int
    incarnation: str


@dataclass
class Absentees:
    """The clients that are not up to date, and the states at which they left.

    All clients that are up to date are bit-identical, so the simulation holds them as one, and those that left in the
    same round as one, too. What these do when they return is done to a copy of the state at which they left, which must
    then equal the others bit for bit.

    Args:
        optimizer: Of the clients that are up to date.
        log: The update log.
        transport: Counts what is sent.
        settings: Replay or snapshot.

    Attributes:
        absences: What each absent client holds.
        states: By version, as long as an absent client holds it.
        chosen: Returns so far, by ``replay`` and ``snapshot``.
    """

    optimizer: ZerothOrder
    log: ReplayLog
    transport: InProcess
    settings: CatchUp
    absences: dict[int, Absence] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    chosen: Counter[str] = field(default_factory=Counter)

    def attend(self, round: int, online: Iterable[int], clients: int, incarnation: str) -> None:
        """The clients online in this round are brought up to date; the others are away from now on.

        Args:
            round: The round, and so the number of updates that the others hold.
            online: Who is there.
            clients: ``N``, all of the run.
            incarnation: Of the server.

        Raises:
            CatchUpError: A returning client did not end bit-identical.
        """
        present = set(online)
        together: dict[Absence, list[int]] = {}
        for client in sorted(present & self.absences.keys()):
            together.setdefault(self.absences.pop(client), []).append(client)
        for absence, returning in together.items():
            self._bring_back(returning, absence, round, incarnation)
        leaving = set(range(clients)) - present - self.absences.keys()
        if leaving and round not in self.states:
            self.states[round] = client_state(self.optimizer, copy=True)
        self.absences |= dict.fromkeys(leaving, Absence(round, self._maker(round, incarnation)))
        held = {absence.version for absence in self.absences.values()}
        self.states = {version: state for version, state in self.states.items() if version in held}

    def _bring_back(self, clients: Sequence[int], absence: Absence, round: int, incarnation: str) -> None:
        for client in clients:
            self.transport.up(CatchUpRequest(round, client, absence.version, absence.incarnation))
        if absence.version > round or self._maker(absence.version, absence.incarnation) != absence.incarnation:
            reason: str | None = (
                f"update {absence.version} of server {absence.incarnation} is not in the history of {incarnation}, "
                f"which is at round {round}"
            )
        elif absence.version == round:
            return  # away only while this round was tried before: nothing was missed
        else:
            reason = self._prefer_snapshot(absence.version, round)
        if reason is None:
            self._replay(clients, absence.version, round)
        else:
            for client in clients:
                self._send_snapshot(Snapshot(round, client, round, incarnation, reason, *self._current()))
        self.chosen["replay" if reason is None else "snapshot"] += len(clients)

    def _maker(self, version: int, otherwise: str) -> str:
        """The server that made the last of the first ``version`` updates; nobody made the start."""
        return self.log.incarnation_of(version - 1) if version else otherwise

    def _prefer_snapshot(self, version: int, round: int) -> str | None:
        frames = self.log.frames(version, round)
        first = next(frames)
        basis = self._record(first).basis
        elements = sum(p.numel() for p in self.optimizer.parameters)
        drawn = elements * basis.get("probes", 0) * SECONDS_PER_ELEMENT.get(basis.get("distribution", ""), 0)
        seconds = (round - version) * (SECONDS_PER_RECORD + drawn)
        whole = encoded_size(Snapshot(round, 0, round, "", "", *self._current()))
        return self.settings.objection(len(first) + sum(map(len, frames)), seconds, whole)

    def _replay(self, clients: Sequence[int], version: int, round: int) -> None:
        replica = replica_of(self.optimizer, self.states[version], version)
        for frame in self.log.frames(version, round):
            apply_update(self.transport.down(self._record(frame), receivers=len(clients)), replica)
        self._compare(replica, f"clients {clients} replayed {round - version} round(s) from {version} on and do")

    def _send_snapshot(self, snapshot: Snapshot) -> None:
        received = self.transport.down(snapshot)
        replica = replica_of(self.optimizer, received.tensors, received.step)
        self._compare(replica, f"client {snapshot.client} took a snapshot and does")

    def _compare(self, replica: ZerothOrder, who: str) -> None:
        same = same_state(client_state(replica), client_state(self.optimizer)) and replica.steps == self.optimizer.steps
        if not same:
            raise CatchUpError(f"{who} not hold what the others hold")

    def _record(self, frame: bytes) -> Update:
        return recorded(frame, self.transport.run_id)

    def _current(self) -> tuple[int, State]:
        return self.optimizer.steps, client_state(self.optimizer)

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


def client_state(optimizer: ZerothOrder, copy: bool = False) -> State:
    """θ_c and the optimizer's moments, ``number.theta`` and ``number.slot``: all that a client needs to go on."""
    held: State = {}
    for number, parameter in enumerate(optimizer.parameters):
        slots = {"theta": parameter.detach(), **optimizer.state.get(parameter, {})}
        held |= {f"{number}.{slot}": t.to("cpu", copy=True) if copy else t for slot, t in slots.items()}
    return held


def sized_state(optimizer: ZerothOrder) -> State:
    """What `client_state` gives after the first step, without its values or their memory."""
    slots = optimizer.rule.slots(optimizer.param_groups[0])
    held: State = {}
    for number, p in enumerate(optimizer.parameters):
        held[f"{number}.theta"] = torch.empty_like(p, device="meta")
        held |= {f"{number}.{slot}": torch.empty(p.numel(), dtype=torch.float32, device="meta") for slot in slots}
    return held


def replica_of(optimizer: ZerothOrder, state: Mapping[str, Tensor], step: int) -> ZerothOrder:
    """An optimizer over tensors of its own, with another's rule and seed, at ``state`` after ``step`` updates."""
    parameters = [nn.Parameter(torch.empty_like(p), requires_grad=False) for p in optimizer.parameters]
    replica = ZerothOrder(parameters, optimizer.rule, seed=optimizer.param_groups[0]["seed"])
    replica.param_groups[0]["step"] = step
    for name, tensor in state.items():
        number, _, slot = name.partition(".")
        parameter = parameters[int(number)]
        if slot == "theta":
            parameter.copy_(tensor)
        else:
            replica.state[parameter][slot] = tensor.to(parameter.device, copy=True)
    return replica


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two clients hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(_bits(a[name]), _bits(b[name].to(a[name].device))) for name in a)


def _bits(tensor: Tensor) -> Tensor:
    # As bytes: −0 is not 0, and a NaN equals itself.
    return tensor.contiguous().view(-1).view(torch.uint8)
