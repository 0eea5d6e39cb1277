"""RoundCallback: what takes part in a round, in an Orchestrator or, run by HybridOrder, in a plain Trainer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from hosfl_lightning.server import RoundWatcher


class RoundCallback(Callback, RoundWatcher):
    """Reports once a round; in a plain Trainer, where a round may be several batches, when `HybridOrder` says so.

    Attributes:
        adopted: A `HybridOrder` of the same Trainer runs it.
    """

    adopted = False
    #: What it must be told of a round, one of `Algorithm.tells`; None: nothing.
    needs: ClassVar[str | None] = None

    @abstractmethod
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log what the round left."""

    def forget(self) -> None:  # most have nothing to forget
        """What was seen belongs to a round that is given up."""

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
