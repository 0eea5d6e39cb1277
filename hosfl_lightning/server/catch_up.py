"""Clients that missed updates and come back: whether they are sent the records or a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hosfl_lightning.aggregation import recorded
from hosfl_lightning.clients.catch_up import client_state
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import CatchUpRequest, Snapshot, Update, encoded_size

#: Seconds to read, check and decode one record on one core, whatever its size: see benchmarks/replay.py.
SECONDS_PER_RECORD = 2e-3
#: Seconds to add one element of one direction on one core: see benchmarks/directions.py.
SECONDS_PER_ELEMENT = {"rademacher": 0.6e-9, "gauss16": 5.3e-9}


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


@dataclass
class Records:
    """What a server answers to a client that comes back.

    Args:
        replica: The optimizer of the clients that are up to date.
        log: The update log.
        settings: Replay or snapshot.
        run_id: Of the log's frames.
        incarnation: Of this server.
    """

    replica: ZerothOrder
    log: ReplayLog
    settings: CatchUp
    run_id: bytes
    incarnation: str

    def answer(self, request: CatchUpRequest) -> Iterator[Update] | Snapshot | None:
        """The updates that it missed, in order, or a whole state with the reason; None: it missed nothing."""
        version, round = request.version, request.round
        if version > round or self.maker(version, request.incarnation) != request.incarnation:
            reason: str | None = (
                f"update {version} of server {request.incarnation} is not in the history of {self.incarnation}, "
                f"which is at round {round}"
            )
        elif version == round:
            return None  # away only while this round was tried before
        else:
            reason = self._prefer_snapshot(version, round)
        if reason is None:
            return (recorded(frame, self.run_id) for frame in self.log.frames(version, round))
        state = self.replica.steps, client_state(self.replica)
        return Snapshot(round, request.client, round, self.incarnation, reason, *state)

    def maker(self, version: int, otherwise: str) -> str:
        """The server that made the last of the first ``version`` updates; nobody made the start."""
        return self.log.incarnation_of(version - 1) if version else otherwise

    def _prefer_snapshot(self, version: int, round: int) -> str | None:
        frames = self.log.frames(version, round)
        first = next(frames)
        basis = recorded(first, self.run_id).basis
        elements = sum(p.numel() for p in self.replica.parameters)
        drawn = (
            elements
            * basis.get("probes", 0)
            * len(basis.get("clients", "1"))
            * SECONDS_PER_ELEMENT.get(basis.get("distribution", ""), 0)
        )
        seconds = (round - version) * (SECONDS_PER_RECORD + drawn)
        whole = encoded_size(Snapshot(round, 0, round, "", "", self.replica.steps, client_state(self.replica)))
        return self.settings.objection(len(first) + sum(map(len, frames)), seconds, whole)
