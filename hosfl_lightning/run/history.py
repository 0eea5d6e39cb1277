"""What a run has sent, and to whom: the update log, the server's incarnation, and the clients that were away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hosfl_lightning.aggregation import recorded
from hosfl_lightning.clients.catch_up import sized_state
from hosfl_lightning.files import discard
from hosfl_lightning.fleet import Absentees, Channel, Fleet
from hosfl_lightning.fleet.absentees import Absence
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import Basis
from hosfl_lightning.run.folder import Resumption
from hosfl_lightning.run.identity import digest, hardware, incarnation, run_id
from hosfl_lightning.server import CatchUp, Records, Replica
from hosfl_lightning.server.replay_log import ReplayLog, WitnessError
from hosfl_lightning.wire import LIMIT, PROTOCOL, RULES, Snapshot, TooLargeError, Update, encode, encoded_size, manifest


@dataclass
class History:
    """One run's past.

    Args:
        start: What the log says of the run, and of the server that began it here.
        channel: Whose envelopes carry the run's id.
        replica: What the clients that are up to date hold.
        incarnation: Which server this is, on which hardware.
        log: The update log; None where none is kept (a control, all processes but the first).
        absentees: Who of simulated clients is not up to date; None without a log.
        records: What answers clients on other machines that come back; None without a log.
        online: Who is there in the present round.
        attempt: How often the present round was repeated.
    """

    start: dict[str, Any]
    channel: Channel
    replica: Replica
    incarnation: str = ""
    log: ReplayLog | None = None
    absentees: Absentees | None = None
    records: Records | None = None
    online: Sequence[int] = ()
    attempt: int = 0

    @classmethod
    def of(
        cls, agreed: dict[str, Any], model: SplitModule, replica: Replica, channel: Channel, device: torch.device
    ) -> History:
        """A run that has no past yet; its messages bear its id from here on.

        Args:
            agreed: What a resumed run must agree on.
            model: The cut model.
            replica: What its clients train.
            channel: Carries the messages.
            device: Where the run takes place.
        """
        backbone, here = model.fingerprint(), hardware(device)
        channel.run_id = run_id(agreed, replica.trained, backbone)
        start: dict[str, Any] = {
            "protocol": PROTOCOL,
            "rules": RULES,
            "run_id": channel.run_id.hex(),
            "incarnation": incarnation(0, here),
            "hardware": here,
            "manifest": manifest(replica.trained),
            "initial": digest(replica.trained),
            "settings": agreed,
            "pretrained": model.pretrained,
            "fingerprint": backbone,
        }
        return cls(start, channel, replica, start["incarnation"])

    def open(
        self,
        path: Path,
        resumed: Resumption | None,
        basis: Basis,
        sampled: int,
        catch_up: CatchUp,
        online: Callable[[int, int], Sequence[int]] | None,
        fleet: Fleet,
    ) -> None:
        """Begin the log; or go on with it: records after the checkpoint are witnesses of what is executed again.

        On other hardware than before they are another server's: they are voided, and clients that hold them are ahead.

        Args:
            path: The file.
            resumed: Where the run goes on.
            basis: In what its updates are expressed.
            sampled: Clients of a round.
            catch_up: How clients that were away come back.
            online: Who was there, by round and attempt; None: everybody always is.
            fleet: Whose clients catch up with the log.

        Raises:
            ReplayLogError: The log is damaged, or not the one that was written with the checkpoint.
            TooLargeError: Updates or snapshots of this run would be longer than a message may be.
        """
        round = resumed.round if resumed is not None else 0
        saved = resumed.checkpoint["history"] if resumed is not None and resumed.checkpoint is not None else None
        before = ReplayLog.read(path) if resumed is not None and path.exists() else None
        if before is not None:
            self.incarnation = self._successor(before, round)
            self.start["initial"] = before.starts[0]["initial"]  # of a model that may hold anything when a run goes on
        self._check_sizes(basis, sampled, always=online is None)
        if resumed is None:
            discard(path)
        start = {**self.start, "incarnation": self.incarnation}
        self.log = ReplayLog.open(path, start, round, saved["log_head"] if saved else None)
        records = Records(self.replica.optimizer, self.log, catch_up, self.channel.run_id, self.incarnation)
        fleet.catches_up_with(records)
        if fleet.simulated and self.replica.trained:  # who was away has missed nothing where nothing is shared
            self.absentees = Absentees(self.replica.optimizer, records, self.channel)
            if saved and saved["absentees"]:
                self.absentees.load_state_dict(saved["absentees"])
            self._strand(saved["starts"] if saved else 0, online)
        elif not fleet.simulated:
            self.records = records
        if before is not None and before.rounds > self.log.rounds:
            self._tell(before)

    def attend(self, round: int, online: Sequence[int], clients: int, attempt: int = 0) -> None:
        """Who is online now, at this attempt of the round, is brought up to date."""
        self.online, self.attempt = online, attempt
        if self.absentees is not None:
            self.absentees.attend(round, online, clients)

    def publish(self, update: Update) -> Update:
        """Written and synced before it is sent; what is to be sent."""
        update = replace(update, incarnation=self.incarnation, attempt=self.attempt)
        if self.log is not None:
            try:
                self.log.append(update.round, encode(update, self.channel.run_id))
            except WitnessError:
                if self.records is None:
                    raise
                return self._begin_anew(update)
        return update

    def _begin_anew(self, update: Update) -> Update:
        """Other clients took part than the first time: what is on record from here on is void.

        Clients that hold it are ahead of this server, and are sent a snapshot when they come.
        """
        assert self.log is not None and self.records is not None
        self.incarnation = incarnation(len(self.log.starts), self.start["hardware"])
        self.log.void(update.round, {**self.start, "incarnation": self.incarnation})
        self.records.incarnation = self.incarnation
        return self.publish(update)

    def state_dict(self, round: int) -> dict[str, Any] | None:
        """The log's head after ``round`` records, its STARTs so far, and who is away; None without a log."""
        if self.log is None:
            return None
        held = {"log_head": self.log.head(round), "starts": len(self.log.starts)}
        return held | {"absentees": self.absentees.state_dict() if self.absentees is not None else None}

    def _successor(self, log: ReplayLog, round: int) -> str:
        """The log's last server, where all from ``round`` on is its and it ran on this hardware; else a new one."""
        last = log.starts[-1]
        makers = {last["incarnation"], *(log.incarnation_of(r) for r in range(round, log.rounds))}
        if makers == {last["incarnation"]} and last["hardware"] == self.start["hardware"]:
            return last["incarnation"]
        return incarnation(len(log.starts), self.start["hardware"])

    def _check_sizes(self, basis: Basis, sampled: int, always: bool) -> None:
        """Refuse what would be written, and then could not be read or sent."""
        fewer = f"over the limit of {LIMIT:,}: train fewer client parameters (model.init_args.lora), or"
        basis = basis.of_clients(range(sampled))
        coefficients, weights = torch.empty(basis.size, device="meta"), [1 / 3] * sampled
        size = encoded_size(Update(0, basis.describe(), coefficients, {}, 0, list(range(sampled)), weights))
        if size > LIMIT:
            raise TooLargeError(
                f"trainer.replay_log: an update of this run has {size:,} bytes, {fewer} set trainer.replay_log: false"
            )
        if always and self.incarnation == self.start["incarnation"]:
            return  # nobody will need a snapshot
        size = encoded_size(Snapshot(0, 0, 0, "", "", 0, sized_state(self.replica.optimizer)))
        if size > LIMIT:
            raise TooLargeError(
                f"trainer.availability: a snapshot for a client that was away has {size:,} bytes, {fewer} keep all "
                "clients online (Always) and the run on the hardware where it began"
            )

    def _strand(self, first: int, online: Callable[[int, int], Sequence[int]] | None) -> None:
        """Clients that were online in rounds which ``log.starts[first:]`` voided hold what this server has not.

        From the log and not from what this process voids: a kill before the next checkpoint must not forget them.
        """
        assert self.log is not None and self.absentees is not None
        for frame in self.log.voided_frames(first):
            update = recorded(frame, self.channel.run_id)
            held = Absence(update.round + 1, update.incarnation)
            there = self.everybody if online is None else online(update.round, update.attempt)
            self.absentees.strand(there, held)

    @property
    def everybody(self) -> range:
        """The run's clients."""
        return range(self.start["settings"]["clients"])

    def _tell(self, before: ReplayLog) -> None:
        assert self.log is not None
        voided = range(self.log.rounds, before.rounds)
        print(
            f"The server came back on other hardware ({self.start['hardware']}; before: "
            f"{before.starts[-1]['hardware']}) at round {voided[0]}: rounds {voided[0]} to {voided[-1]} are run anew; "
            "clients that hold their updates are sent a snapshot when they return."
        )
