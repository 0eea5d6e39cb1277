"""RoundCallback: what takes part in a round, in an Orchestrator or, run by HybridOrder, in a plain Trainer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override


class RoundCallback(Callback):
    """Reports once a round; in a plain Trainer, where a round may be several batches, when `HybridOrder` says so.

    Attributes:
        adopted: A `HybridOrder` of the same Trainer runs it.
    """

    adopted = False

    @abstractmethod
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log what the round left."""

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so where nothing will ever be reported."""
        if isinstance(trainer, Trainer) and not self.adopted:
            rank_zero_warn(f"{type(self).__name__} has nothing to report in this Trainer: it needs rounds; add "
                           "HybridOrder(cut=...) to trainer.callbacks")  # fmt: skip

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The round is over."""
        if not isinstance(trainer, Trainer):
            self.report(trainer, pl_module)
