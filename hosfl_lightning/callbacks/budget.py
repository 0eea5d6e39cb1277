"""Budget: what all clients have spent, and the end of the run when it is enough."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from hosfl_lightning.callbacks.drop_in.trainer_check import refuse_no_rounds
from hosfl_lightning.callbacks.peak_memory_monitor import PeakMemoryMonitor


class Budget(Callback):
    """Counts what a method spends, in units that methods share, and stops it at a limit.

    The run ends with the first round that reaches a limit, so it spends at most one round more.

    | logged key | meaning, all clients, since the first round | unit |
    |---|---|---|
    | ``budget/samples`` | examples behind what was taken of the clients, all local steps | examples |
    | ``budget/client_forwards`` | matrix FLOPs over those of one plain forward of the client half | forwards |

    The bytes are those of ``comm/total_bytes``. Of a round that was repeated (``on_too_few: repeat``) the bytes of all
    attempts count, but the samples and forwards of the one that succeeded alone.

    Args:
        samples: Limit of ``budget/samples``; None: counted only, as of the others.
        bytes: Limit of ``comm/total_bytes``.
        client_forwards: Limit of ``budget/client_forwards``.

    Raises:
        ValueError: A limit is not above 0; or at setup, in a Trainer without rounds.
    """

    def __init__(
        self, samples: int | None = None, bytes: int | None = None, client_forwards: float | None = None
    ) -> None:
        self.limits = {"samples": samples, "bytes": bytes, "client_forwards": client_forwards}
        for name, limit in self.limits.items():
            if limit is not None and limit <= 0:
                raise ValueError(f"{name}={limit}: a budget must be above 0")
        self.spent: dict[str, float] = dict.fromkeys(self.limits, 0)

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a plain Trainer."""
        refuse_no_rounds(type(self).__name__, trainer)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the round, log, and stop when a limit is reached."""
        memory = next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor))
        self.spent["samples"] += trainer.processes.count(outputs["num_examples"])
        self.spent["bytes"] += sum(sent.bytes * sent.receivers for sent in trainer.fleet.entries())
        self.spent["client_forwards"] += len(batch.clients) * memory.report["client_forwards"]
        for name in ("samples", "client_forwards"):
            pl_module.log(f"budget/{name}", self.spent[name])
        if any(limit is not None and self.spent[name] >= limit for name, limit in self.limits.items()):
            trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"spent": dict(self.spent)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.spent = dict(state_dict["spent"])
