"""The same rounds again with another client: what stands beside every result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning.algorithms import Algorithm, Frozen, SplitFedSGD
from hosfl_lightning.callbacks import RoundProgressBar
from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.run.settings import RunSettings

KINDS: dict[str, type[Algorithm]] = {"frozen": Frozen, "first_order": SplitFedSGD}


class Again(Protocol):
    """Makes an orchestrator with these settings in the place of the run's own."""

    def __call__(self, algorithm: Algorithm, settings: RunSettings, callbacks: list[Callback], logger: Any) -> Any:
        """See there."""


def run_control(
    trainer: TrainerFace, again: Again, name: str, start: dict[str, Tensor], first: Evaluation
) -> RunResult:
    """The rounds of ``trainer`` from the same start, seeds and batches; the model ends as trained as it was.

    Its curves are written to ``controls/<name>/metrics.csv`` of the run folder.

    Args:
        trainer: After its own run.
        again: Makes the control's orchestrator.
        name: A key of `KINDS`.
        start: The trained tensors as they were before the first round.
        first: The validation at that start.
    """
    model, method, settings = trainer.lightning_module, trainer.algorithm, trainer.settings
    trained = {n: t.clone() for n, t in model.trained_state().items()}
    logger = CSVLogger(str(Path(trainer.log_dir) / "controls"), name=name, version="") if trainer.loggers else None
    if logger is not None:
        logger.resume(-1)  # a run that goes on runs its controls anew
    own_rule = getattr(method, "first_order_optimizer", None) if name == "first_order" else None
    changed = replace(
        settings,
        max_rounds=max(trainer.global_step, 1),  # as many as the method ran, if it stopped early
        controls=[],
        codec=replace(settings.codec, gradient="fp32"),  # what rounding a gradient costs is the method's
        replay_log=False,
    )
    bar: list[Callback] = [RoundProgressBar(f"control: {name}")] if trainer.progress_bar_callback else []
    rule = own_rule or method.client_optimizer
    runner = again(KINDS[name](rule, method.make_scheduler, method.aggregation), changed, bar, logger)
    runner.follows = trainer.run.attempts
    try:
        model.load_trained_state(start)
        return runner.rerun(model, trainer.datamodule, first)
    finally:
        model.load_trained_state(trained)
