"""Validation on what clients on other machines hold out: they send z and labels, and nothing comes back."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch.trainer.states import RunningStage

from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.result import Evaluation


class NothingHeldOutError(ValueError):
    """No client that is there has validation data."""


def validate_only_on_clients(trainer: TrainerFace) -> Evaluation:
    """`validate_on_clients` in the place of the server's own validation, with Trainer's hooks."""
    trainer.state.stage = RunningStage.VALIDATING
    trainer.call("on_validation_start")
    trainer.call("on_validation_epoch_start")
    evaluation = validate_on_clients(trainer, "val/")
    trainer.call_callbacks("on_validation_epoch_end")  # not the module: it would log metrics that have seen nothing
    trainer.call("on_validation_end")
    trainer.has_validated = True
    trainer.state.stage = RunningStage.TRAINING
    return evaluation


@torch.no_grad()
def validate_on_clients(trainer: TrainerFace, prefix: str) -> Evaluation:
    """``Σ_k n_k ℓ_k(f_s(z_k; θ_s), y_k) / Σ n`` over the held-out data of the clients that are there, and its metrics.

    Args:
        trainer: Whose fleet is asked.
        prefix: Of the metrics' names: ``val/`` or ``val_clients/``.

    Raises:
        NothingHeldOutError: No client sent any.
    """
    trainer.fleet.gather_quorum(trainer.global_step, trainer.sample_size)
    module, fleet, losses = trainer.lightning_module, trainer.fleet, list[float]()
    metrics = {name: metric.to(trainer.fabric.device) for name, metric in module.build_metrics().items()}
    for message in fleet.hold_out(trainer.global_step):
        reason = module.objection(message)
        if reason is not None:
            fleet.refuse(message.client, reason)
            continue
        batch = trainer.to_device(dict(zip(("z", "labels", "attention_mask"), message.unpack())))
        if not module.count(batch["labels"]):
            continue
        with trainer.fabric.autocast(), eager(module.compiles):
            loss = module.take_smashed(metrics, batch["z"], batch["attention_mask"].long(), batch["labels"])
            losses.append(float(loss))
    for client, reason in fleet.refused.items():
        warnings.warn(f"validation of round {trainer.global_step}: client {client}: {reason}", stacklevel=2)
    fleet.refused.clear()
    if not losses:
        raise NothingHeldOutError(
            "--validate: no client that is there holds out validation data; give the clients' data some, or take server"
        )
    values: dict[str, Any] = {f"{prefix}{name}": float(v) for name, v in module.computed(metrics).items()}
    module.log_dict(values)
    return Evaluation(values, losses, trainer.global_step)
