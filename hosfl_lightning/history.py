"""What a run has sent, and to whom: the update log, the server's incarnation, and the clients that were away."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hosfl_lightning.aggregation import recorded
from hosfl_lightning.availability import Always
from hosfl_lightning.catch_up import Absence, Absentees, sized_state
from hosfl_lightning.checkpoint import settings_of
from hosfl_lightning.files import discard
from hosfl_lightning.identity import digest, hardware, incarnation, manifest, run_id
from hosfl_lightning.replay import ReplayLog
from hosfl_lightning.run_folder import Resumption
from hosfl_lightning.transport import InProcess
from hosfl_lightning.wire import LIMIT, PROTOCOL, Snapshot, TooLargeError, Update, encode, encoded_size

if TYPE_CHECKING:
    from hosfl_lightning.orchestrator import Orchestrator


@dataclass
class History:
    """One run's past.

    Args:
        start: What the log says of the run, and of the server that began it here.
        transport: Whose envelopes carry the run's id.
        incarnation: Which server this is, on which hardware.
        log: The update log; None where none is kept (a control, all processes but the first).
        absentees: Who is not up to date; None without a log.
        online: Who is there in the present round.
        attempt: How often the present round was repeated.
    """

    start: dict[str, Any]
    transport: InProcess
    incarnation: str = ""
    log: ReplayLog | None = None
    absentees: Absentees | None = None
    online: list[int] = field(default_factory=list)
    attempt: int = 0

    @classmethod
    def of(cls, trainer: Orchestrator) -> History:
        """A run that has no past yet; its messages bear its id from here on."""
        model, settings = trainer.lightning_module, settings_of(trainer)
        trained, backbone = trainer.algorithm.parameters(model), model.fingerprint()
        name = run_id(settings, trained, backbone)
        here = hardware(trainer.fabric.device)
        trainer.transport.run_id = name
        start = {
            "protocol": PROTOCOL,
            "run_id": name.hex(),
            "incarnation": incarnation(0, here),
            "hardware": here,
            "manifest": manifest(trained),
            "initial": digest(trained),
            "settings": settings,
            "pretrained": model.pretrained,
            "fingerprint": backbone,
        }
        return cls(start, trainer.transport, start["incarnation"])

    def open(self, path: Path, resumed: Resumption | None, trainer: Orchestrator) -> None:
        """Begin the log; or go on with it: records after the checkpoint are witnesses of what is executed again.

        On other hardware than before they are another server's: they are voided, and clients that hold them are ahead.

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
        self._check_sizes(trainer)
        if resumed is None:
            discard(path)
        start = {**self.start, "incarnation": self.incarnation}
        self.log = ReplayLog.open(path, start, round, saved["log_head"] if saved else None)
        self.absentees = Absentees(trainer.algorithm.client.optimizer, self.log, trainer.transport, trainer.catch_up)
        if saved:
            self.absentees.load_state_dict(saved["absentees"])
        self._strand(saved["starts"] if saved else 0, trainer)
        if before is not None and before.rounds > self.log.rounds:
            self._tell(before)

    def attend(self, round: int, online: list[int], clients: int, attempt: int = 0) -> None:
        """Who is online now, at this attempt of the round, is brought up to date."""
        self.online, self.attempt = online, attempt
        if self.absentees is not None:
            self.absentees.attend(round, online, clients, self.incarnation)

    def publish(self, update: Update) -> Update:
        """Written and synced, then sent to all that are online; what they receive."""
        update = replace(update, incarnation=self.incarnation, attempt=self.attempt)
        if self.log is not None:
            self.log.append(update.round, encode(update, self.transport.run_id))
        return self.transport.broadcast(update, receivers=len(self.online))

    def state_dict(self, round: int) -> dict[str, Any] | None:
        """The log's head after ``round`` records, its STARTs so far, and who is away; None without a log."""
        if self.log is None or self.absentees is None:
            return None
        held = {"log_head": self.log.head(round), "starts": len(self.log.starts)}
        return held | {"absentees": self.absentees.state_dict()}

    def _successor(self, log: ReplayLog, round: int) -> str:
        """The log's last server, where all from ``round`` on is its and it ran on this hardware; else a new one."""
        last = log.starts[-1]
        makers = {last["incarnation"], *(log.incarnation_of(r) for r in range(round, log.rounds))}
        if makers == {last["incarnation"]} and last["hardware"] == self.start["hardware"]:
            return last["incarnation"]
        return incarnation(len(log.starts), self.start["hardware"])

    def _check_sizes(self, trainer: Orchestrator) -> None:
        """Refuse what would be written, and then could not be read or sent."""
        optimizer, basis, sampled = trainer.algorithm.client.optimizer, trainer.algorithm.basis(0), trainer.num_sampled
        assert basis is not None
        fewer = f"over the limit of {LIMIT:,}: train fewer client parameters (model.init_args.lora), or"
        coefficients, weights = torch.empty(basis.size, device="meta"), [1 / 3] * sampled
        size = encoded_size(Update(0, basis.describe(), coefficients, {}, 0, list(range(sampled)), weights))
        if size > LIMIT:
            raise TooLargeError(
                f"trainer.replay_log: an update of this run has {size:,} bytes, {fewer} set trainer.replay_log: false"
            )
        if isinstance(trainer.availability, Always) and self.incarnation == self.start["incarnation"]:
            return  # nobody will need a snapshot
        size = encoded_size(Snapshot(0, 0, 0, "", "", 0, sized_state(optimizer)))
        if size > LIMIT:
            raise TooLargeError(
                f"trainer.availability: a snapshot for a client that was away has {size:,} bytes, {fewer} keep all "
                "clients online (Always) and the run on the hardware where it began"
            )

    def _strand(self, first: int, trainer: Orchestrator) -> None:
        """Clients that were online in rounds which ``log.starts[first:]`` voided hold what this server has not.

        From the log and not from what this process voids: a kill before the next checkpoint must not forget them.
        """
        assert self.log is not None and self.absentees is not None
        for frame in self.log.voided_frames(first):
            update = recorded(frame, self.transport.run_id)
            held = Absence(update.round + 1, update.incarnation)
            self.absentees.absences |= dict.fromkeys(trainer.clients_online(update.round, update.attempt), held)

    def _tell(self, before: ReplayLog) -> None:
        assert self.log is not None
        voided = range(self.log.rounds, before.rounds)
        print(
            f"The server came back on other hardware ({self.start['hardware']}; before: "
            f"{before.starts[-1]['hardware']}) at round {voided[0]}: rounds {voided[0]} to {voided[-1]} are run anew; "
            "clients that hold their updates are sent a snapshot when they return."
        )
