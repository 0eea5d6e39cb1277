"""A progress bar that counts rounds."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override


class RoundProgressBar(TQDMProgressBar):
    """One bar for the run, a tick a round, with the last training and validation loss behind it.

    Args:
        description: In front of the bar.
    """

    def __init__(self, description: str = "rounds") -> None:
        super().__init__()
        self.description = description

    @override
    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.total = self.total_train_batches
        bar.set_description(self.description)
        return bar

    @override
    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.description)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step

    @override
    def init_validation_tqdm(self) -> Tqdm:
        # A validation is short and frequent: a bar of its own would only flicker.
        return Tqdm(disable=True)

    @override
    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
