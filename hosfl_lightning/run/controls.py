"""The same rounds again with another client: what stands beside every result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from hosfl_lightning.algorithms import Algorithm, Frozen, SplitFedSGD
from hosfl_lightning.callbacks import RoundProgressBar
from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.another_client import with_client
from hosfl_lightning.run.control import Control
from hosfl_lightning.run.costs import client_costs
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.run.settings import RunSettings
from hosfl_lightning.run.wandb_controls import control_loggers


class Again(Protocol):
    """Makes an orchestrator with these settings in the place of the run's own."""

    def __call__(self, algorithm: Algorithm, settings: RunSettings, callbacks: list[Callback], logger: Any) -> Any:
        """See there."""


def run_control(
    trainer: TrainerFace, again: Again, control: str | Control, start: dict[str, Tensor], first: Evaluation
) -> RunResult:
    """The rounds of ``trainer`` from the same start, seeds and batches; the model ends as trained as it was.

    Its curves are written to ``controls/<name>/metrics.csv`` of the run folder; and to W&B, if the run's are.

    Args:
        trainer: After its own run.
        again: Makes the control's orchestrator.
        control: One of `run.settings.CONTROLS`, which has the run's own client, or a client of its own.
        start: The trained tensors as they were before the first round.
        first: The validation at that start.
    """
    name = named(control)
    method, loggers = _method(trainer, control), list[Logger]()
    if trainer.loggers:
        csv = CSVLogger(str(Path(trainer.log_dir) / "controls"), name=name, version="")
        csv.resume(-1)  # a run that goes on runs its controls anew
        loggers.append(csv)
    bar: list[Callback] = [RoundProgressBar(f"control: {name}")] if trainer.progress_bar_callback else []
    written = trainer.loggers if trainer.is_global_zero else []
    with control_loggers(written, name, method.name) as others:
        runner = again(method, _settings(trainer), bar, [*loggers, *others])
        runner.follows, runner.by_client = trainer.run.attempts, trainer.by_client or bool(trainer.algorithm.personal)
        with _at_the_start(trainer.lightning_module, control, start) as model:
            result = runner.rerun(model, trainer.datamodule, first)
    return replace(result, costs=client_costs(runner))


def named(control: str | Control) -> str:
    """The control's name."""
    return control if isinstance(control, str) else control.name


def _settings(trainer: TrainerFace) -> RunSettings:
    settings = trainer.settings
    return replace(
        settings,
        max_rounds=max(trainer.global_step, 1),  # as many as the method ran, if it stopped early
        controls=[],
        codec=replace(settings.codec, gradient="fp32"),  # what rounding a gradient costs is the method's
        replay_log=False,
        privacy=settings.privacy.of_control() if settings.privacy is not None else None,
        secure_aggregation=False,  # as are the sums to rounding, and these are of clients here
    )


def _method(trainer: TrainerFace, control: str | Control) -> Algorithm:
    if isinstance(control, Control):
        return control.algorithm
    method = trainer.algorithm
    own_rule = getattr(method, "first_order_optimizer", None) if control == "first_order" else None
    shared = own_rule or method.client_optimizer, method.make_scheduler, method.aggregation
    if control == "frozen":
        return Frozen(*shared)
    return SplitFedSGD(*shared, personal=method.personal)


@contextmanager
def _at_the_start(model: SplitModule, control: str | Control, start: dict[str, Tensor]) -> Iterator[SplitModule]:
    """The model with the control's client, and the server as it was before the first round."""
    if isinstance(control, Control):
        other = with_client(model, control.lora, control.side, control.client_parameters)
        server = {name: tensor for name, tensor in start.items() if name.startswith("server_half.")}
        other.load_trained_state(other.trained_state() | server)
        yield other
        return
    trained = {n: t.clone() for n, t in model.trained_state().items()}
    try:
        model.load_trained_state(start)
        yield model
    finally:
        model.load_trained_state(trained)
