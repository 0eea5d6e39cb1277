"""When checkpoints are written: once the round is over, and its row of metrics is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from hosfl_lightning.files import discard
from hosfl_lightning.run import checkpoint as checkpoints


class Saving:
    """The files of a round. A run that goes on from one must find the row.

    Args:
        trainer: A `hosfl_lightning.run.face.TrainerFace`, whose folder it is.
        collect: What a file holds, with weights only or all.

    Attributes:
        pending: Files of the round under way; None between runs, when they are written at once.
    """

    def __init__(self, trainer: Any, collect: Callable[[bool], dict[str, Any]]) -> None:
        self.trainer, self.collect = trainer, collect
        self.pending: dict[str, bool | None] | None = None

    def later(self, filepath: str, weights_only: bool | None) -> None:
        """Write a file with weights only, or with all, or delete it (None), at the end of the round."""
        name = os.path.relpath(filepath, self.trainer.log_dir)
        if self.pending is None:
            self.write({name: weights_only})
        else:
            self.pending[name] = weights_only

    def end_round(self) -> None:
        """The files that are due."""
        files, self.pending = self.pending or {}, {}
        self.write(files)

    def write(self, files: Mapping[str, bool | None]) -> None:
        """Write the files of a round, with weights only or not, or delete them (None), in this order.

        Each knows of all, so that a run which was killed between them does what it had not done.
        """
        for name, weights_only in files.items():
            path = os.path.join(self.trainer.log_dir, name)
            if weights_only is not None:
                self.save(path, files, weights_only)
            elif self.trainer.is_global_zero:
                discard(path)

    def save(self, filepath: str, files: Mapping[str, bool | None], weights_only: bool = False) -> None:
        """Write one now."""
        trainer = self.trainer
        checkpoint = {**self.collect(weights_only), "files": dict(files)}
        if not weights_only:
            checkpoint["callbacks"] = checkpoints.callback_states(trainer.callbacks)
        trainer.call("on_save_checkpoint", checkpoint=checkpoint)
        if trainer.is_global_zero:
            checkpoints.save(checkpoint, filepath)
        trainer.processes.wait()
