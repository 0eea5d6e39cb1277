"""Where a run is: what a checkpoint is made of, and all that it writes into."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.run.checkpoint import CheckpointError, load_model
from hosfl_lightning.run.history import History
from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.server import Server


@dataclass
class RunState:
    """What changes from round to round.

    Attributes:
        global_step: Rounds that are done.
        should_stop: Whether the round under way is the last one.
        refused: How often a message of each client was not taken.
        attempts: At which attempt each round succeeded.
        result: The validations so far.
        history: What was sent, and to whom.
        record: What the run is made of, `hosfl_lightning.run.record`.
    """

    global_step: int = 0
    should_stop: bool = False
    refused: Counter[int] = field(default_factory=Counter)
    attempts: list[int] = field(default_factory=list)
    result: RunResult | None = None
    history: History | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def collect(
        self, algorithm: Algorithm, endpoint: Endpoint, server: Server, agreed: dict[str, Any], max_rounds: int,
        weights_only: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """What a resumed run needs; the module's own hook adds the tensors that are trained, callbacks their states."""
        checkpoint: dict[str, Any] = {
            "global_step": self.global_step,
            "state_dict": {},
            "settings": agreed,
            "record": self.record,
            "fingerprint": server.module.fingerprint(),
            "validations": [asdict(one) for one in (self.result.first, self.result.last)] if self.result else [],
            # A run that was stopped early stays so, unless it is given more rounds.
            "stopped_of": max_rounds if self.should_stop else 0,
        }
        if algorithm.personal:  # weights too
            checkpoint["personal"] = endpoint.own_parameters()
        if not weights_only:
            scheduler = server.scheduler
            checkpoint["method"] = {**endpoint.state_dict(), **algorithm.state_dict()}
            checkpoint["optimizer_states"] = [server.optimizer.state_dict()]
            checkpoint["lr_schedulers"] = [scheduler.state_dict()] if scheduler is not None else []
            checkpoint["refused"], checkpoint["attempts"] = dict(self.refused), list(self.attempts)
            checkpoint["history"] = self.history.state_dict(self.global_step) if self.history is not None else None
        return checkpoint

    def restore(
        self, checkpoint: dict[str, Any], algorithm: Algorithm, endpoint: Endpoint, server: Server, max_rounds: int
    ) -> None:
        """Continue where the checkpoint, of a run with the same record, was made.

        Raises:
            CheckpointError: Another backbone, or no optimizer states.
        """
        if "method" not in checkpoint:
            raise CheckpointError("ckpt_path: holds weights only, so a run cannot continue from it")
        load_model(server.module, checkpoint)
        endpoint.load_state_dict(checkpoint["method"])
        algorithm.load_state_dict(checkpoint["method"])
        server.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        if server.scheduler is not None:
            server.scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
        self.global_step = checkpoint["global_step"]
        self.refused, self.attempts = Counter(checkpoint["refused"]), list(checkpoint["attempts"])
        self.should_stop = max_rounds <= checkpoint["stopped_of"]
        if checkpoint["validations"]:
            first, last = (Evaluation(**one) for one in checkpoint["validations"])
            self.result = RunResult(first, last)
