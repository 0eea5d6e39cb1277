"""A trial: a few rounds of one client, from the same start, seeds and batches as those of the frozen one."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, nan
from statistics import median
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.callbacks import RoundProgressBar
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.orchestrator import Orchestrator
from hosfl_lightning.run.result import Evaluation

#: In place of a first validation, which nobody reads.
UNSEEN = Evaluation({"val/loss": nan}, [])


class Curve(Callback):
    """The loss of every held-out batch at each validation.

    Args:
        batches: At least so many are made of the held-out examples.

    Attributes:
        losses: By rounds done, ``(batches,)`` fp64.

    Raises:
        ValueError: At setup, where the data is too small to tell anything from noise.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.losses: dict[int, Tensor] = {}
        self._now: list[float] = []

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The data is at hand, and nobody has made a loader of it yet."""
        data = trainer.datamodule
        if len(data.validation_set) < self.batches:
            raise ValueError(
                f"data: its {len(data.validation_set)} held-out examples make no {self.batches} batches to score a "
                "client on; hold out more, or lower --batches"
            )
        different = [len(data.clients[k]) // min(data.batch_size, len(data.clients[k])) for k in data.holders]
        if median(different) < 2:
            raise ValueError(
                f"data: half of the clients use all they have in every round (batch_size {data.batch_size}), so that "
                "no two rounds' gradients are independent; lower data.init_args.batch_size or num_clients"
            )
        data.eval_batch_size = len(data.validation_set) // self.batches

    @override
    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        """A batch without a loss term has none."""
        if outputs is not None:
            self._now.append(float(outputs))

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses[trainer.global_step] = torch.tensor(self._now, dtype=torch.float64)
        self._now = []


class Trials:
    """Runs trials under a recipe's settings; they write nothing.

    Args:
        trainer: The recipe's.
        data: The recipe's.
        rounds: Of each, even, so that the middle one is validated too.
        batches: Held-out batches at least.
        folder: That nobody keeps.
    """

    def __init__(self, trainer: Any, data: FederatedDataModule, rounds: int, batches: int, folder: str) -> None:
        self.trainer, self.data, self.rounds, self.batches, self.folder = trainer, data, rounds, batches, folder

    def run(self, model: SplitModule, method: Algorithm, gradient: str, name: str) -> tuple[Any, dict[int, Tensor]]:
        """One; the model ends as its rounds leave it.

        Args:
            model: As it starts.
            method: Of the client.
            gradient: In what a client's gradient travels.
            name: On the progress bar.

        Returns:
            Who ran it, and the losses of held-out batches in the middle and at the end.
        """
        curve = Curve(self.batches)
        bar: list[Callback] = [RoundProgressBar(f"trial: {name}")] if self.trainer.progress_bar_callback else []
        runner = self.orchestrator(method, gradient, self.rounds, [curve, *bar])
        runner.rerun(model, self.data, UNSEEN)
        return runner, curve.losses

    def orchestrator(self, method: Algorithm, gradient: str, rounds: int, callbacks: list[Callback]) -> Orchestrator:
        """Of so many rounds."""
        settings = self.trainer.settings
        settings = replace(
            settings, max_rounds=rounds, val_check_interval=ceil(rounds / 2), controls=[], replay_log=False,
            codec=replace(settings.codec, gradient=gradient),
        )  # fmt: skip
        return Orchestrator(
            method, **settings.arguments(), accelerator=self.trainer.fabric.device.type, callbacks=callbacks,
            logger=False, default_root_dir=self.folder, enable_progress_bar=False, enable_checkpointing=False,
        )  # fmt: skip
