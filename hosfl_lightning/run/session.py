"""A model and its data, made ready for one entry point and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from torch import nn

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.models.checks import check_padding
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.run import folder
from hosfl_lightning.run.by_client import of_checkpoint
from hosfl_lightning.run.data_check import check_data, set_up
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.hooks import check_hooks
from hosfl_lightning.run.nodes import meet
from hosfl_lightning.run.privacy import resolve
from hosfl_lightning.run.record import compare_model
from hosfl_lightning.run.state import RunState


@contextmanager
def session(
    trainer: TrainerFace, model: SplitModule, data: FederatedDataModule, fn: TrainerFn, ckpt_path: str | None = None
) -> Iterator[None]:
    """Model and data are ready inside; whatever happens, loggers are closed and everything is put back.

    Args:
        trainer: Whose callbacks and loggers take part.
        model: The cut model.
        data: The clients' data.
        fn: What is going to be done.
        ckpt_path: A checkpoint of the model, for an evaluation.
    """
    meet(trainer)
    checkpoint = folder.weights(ckpt_path) if ckpt_path else None
    check_model(model)
    if not isinstance(data, FederatedDataModule):
        raise TypeError(f"datamodule must be a hosfl_lightning.data.FederatedDataModule, got {type(data).__name__}")
    if checkpoint is not None:
        check_weights(trainer, model, checkpoint)
    check_hooks(trainer.callbacks, model, data)
    trainer.lightning_module, trainer.datamodule, trainer.ckpt_path = model, data, ckpt_path
    trainer.forget_holding()
    trainer.enter(fn, RunningStage.TRAINING if fn is TrainerFn.FITTING else RunningStage(fn.value))
    trainer.run, trainer.has_validated = RunState(), False
    trainer.row.drop()
    trainer.callback_metrics.clear()
    _prepare_data(trainer, model, data, fn)
    trainer.fabric.launch()  # when settings, model and data have been found good: what is wrong is said once
    folder.agree(trainer.loggers, trainer.processes)
    found = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in model.parameters()]
    fabric_before = model._fabric
    model.fabric = trainer.fabric  # self.log and self.manual_backward go through Fabric
    try:
        # Not `setup_module`: under several processes it would wrap the server for DDP, whose sums know no order.
        trainer.fabric.to_device(trainer.fabric.strategy.precision.convert_module(model))
        model.eval()
        if checkpoint is not None:
            checkpoints.load_model(model, checkpoint)
        trainer.own_halves = of_checkpoint(model, checkpoint or {})
        folder.open_loggers(trainer.loggers)
        with folder.may_hold_checkpoints(trainer.log_dir):
            trainer.call("setup", stage=fn.value)
        yield
    except BaseException as error:
        trainer.state.status = TrainerStatus.INTERRUPTED
        trainer.call("on_exception", exception=error)
        raise
    finally:
        _finish(trainer, fn.value, *found)
        model._fabric = fabric_before


def check_weights(trainer: TrainerFace, model: SplitModule, checkpoint: dict[str, Any]) -> None:
    """Refuse weights that mean something else in this model.

    Raises:
        CheckpointError: They do.
    """
    if not compare_model(model, checkpoint.get("record")) and trainer.is_global_zero:
        print("ckpt_path: the checkpoint is of an earlier version, which kept no record of its model; LoRA's alpha and "
              "what else leaves the weights' shapes as they are is not compared", flush=True)  # fmt: skip


def check_model(model: SplitModule) -> None:
    """Refuse what is no cut model.

    Raises:
        TypeError: It is no `SplitModule`, or one inside of `torch.compile`.
    """
    if not isinstance(model, SplitModule):
        hint = " (set model.init_args.compile)" if isinstance(getattr(model, "_orig_mod", None), SplitModule) else ""
        raise TypeError(f"model must be a hosfl_lightning.models.SplitModule, got {type(model).__name__}{hint}")


def _prepare_data(trainer: TrainerFace, model: SplitModule, data: FederatedDataModule, fn: TrainerFn) -> None:
    """Set up and check the data before a run folder is made."""
    if data.tokenizer is None:
        data.tokenizer, data.tokenizer_of = model.tokenizer(), model.pretrained
    elif data.tokenizer_of not in (None, model.pretrained):
        raise ValueError(f"the data was tokenized for {data.tokenizer_of!r}; make it anew for {model.pretrained!r}")
    trainer.narrate(f"{'reading' if data.tokenizer is None else 'reading and tokenizing'} the data")
    data.prepare_data()
    set_up(data, model, fn.value)
    if data.label_names is not None:
        model.name_labels(data.label_names)
    check_data(data, model, fn, None if trainer.serving is None else trainer.serving.validate)
    model.choose_among(data.told_apart_by)
    if fn is TrainerFn.FITTING:
        settings = trainer.settings
        settings.sample_size(data.num_clients, data.num_clients - len(data.holders))
        trainer.privacy = resolve(settings.privacy, data, settings.max_rounds, trainer.serving is None)
    owners = chain(data.clients, [data.validation_set, data.test_set])
    check_padding(data.tokenizer, owners, model.client_half, model.pretrained)


def _finish(
    trainer: TrainerFace, stage: str, modes: list[tuple[nn.Module, bool]], wanted: list[tuple[nn.Parameter, bool]]
) -> None:
    trainer.call("teardown", stage=stage)
    trainer.datamodule.teardown(stage)
    for module, training in modes:
        module.training = training
    for parameter, requires_grad in wanted:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    for logger in trainer.loggers:
        logger.finalize("failed" if trainer.state.status is TrainerStatus.INTERRUPTED else "success")
