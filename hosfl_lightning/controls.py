"""The same rounds again with another client: what stands beside every result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hosfl_lightning.algorithms import Algorithm, Frozen, SplitFedSGD
from hosfl_lightning.callbacks import RoundProgressBar
from hosfl_lightning.evaluation import Evaluation, RunResult
from hosfl_lightning.loggers import CSVLogger

if TYPE_CHECKING:
    from hosfl_lightning.orchestrator import Orchestrator

#: The client does nothing; the client backpropagates and its gradient is averaged every step.
CONTROLS: dict[str, type[Algorithm]] = {"frozen": Frozen, "first_order": SplitFedSGD}


def run_control(trainer: Orchestrator, name: str, start: dict[str, Tensor], first: Evaluation) -> RunResult:
    """The rounds of ``trainer`` from the same start, seeds and batches; the model ends as trained as it was.

    Its curves are written to ``controls/<name>/metrics.csv`` of the run folder.

    Args:
        trainer: After its own run.
        name: A key of `CONTROLS`.
        start: The trained tensors as they were before the first round.
        first: The validation at that start.
    """
    model = trainer.lightning_module
    trained = {n: t.clone() for n, t in model.trained_state().items()}
    logger = CSVLogger(str(Path(trainer.log_dir) / "controls"), name=name, version="") if trainer.loggers else None
    if logger is not None:
        logger.resume(-1)  # a run that goes on runs its controls anew
    rule = getattr(trainer.algorithm, "first_order_optimizer", None) if name == "first_order" else None
    runner = type(trainer)(
        algorithm=CONTROLS[name](
            rule or trainer.algorithm.client_optimizer, trainer.algorithm.make_scheduler, trainer.algorithm.aggregation
        ),
        max_rounds=max(trainer.global_step, 1),  # as many as the method ran, if it stopped early
        clients_per_round=trainer.clients_per_round,
        simulation=trainer.simulation,
        seed=trainer.seed,
        val_check_interval=trainer.val_check_interval,
        log_every_n_steps=trainer.log_every_n_steps,
        accelerator=trainer.fabric.device.type,
        devices=trainer.devices,
        codec=replace(trainer.codec, gradient="fp32"),  # what rounding a gradient costs is the method's
        availability=trainer.availability,
        replay_log=False,
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        callbacks=[RoundProgressBar(f"control: {name}")] if trainer.progress_bar_callback else [],
        logger=logger,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    runner.follows = trainer.attempts
    try:
        model.load_trained_state(start)
        return runner.rerun(model, trainer.datamodule, first)
    finally:
        model.load_trained_state(trained)
