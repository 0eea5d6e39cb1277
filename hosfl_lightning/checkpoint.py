"""Checkpoints that are written whole or not at all, and read without pickle."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hosfl_lightning.evaluation import Evaluation, RunResult
from hosfl_lightning.files import write_whole

if TYPE_CHECKING:
    from hosfl_lightning.orchestrator import Orchestrator
    from hosfl_lightning.servers import SplitModule


#: What Lightning's ModelCheckpoint does not load from its state, or leaves out of it.
_LEFT_OUT = ("current_score", "_last_checkpoint_saved", "_last_global_step_saved", "_defer_save_until_validation")


class CheckpointError(ValueError):
    """The file is not a checkpoint of this run's model and method."""


def save(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint whole or not at all."""
    write_whole(path, lambda file: torch.save(checkpoint, file))


def load(path: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Tensors and plain values only (``weights_only=True``).

    Raises:
        CheckpointError: No such file, torn, with foreign objects, or without a round.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"ckpt_path: no file {str(path)!r}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"ckpt_path: {str(path)!r} is not a whole, plain checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "settings", "fingerprint"} <= set(checkpoint):
        raise CheckpointError(f"ckpt_path: {str(path)!r} was not written by the Orchestrator")
    return checkpoint


def whole(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints of a run folder that can be read, with their files.

    Ours are written whole or not at all. A torn or foreign one is somebody else's doing: it is named and passed over.
    """
    for file in sorted((folder / "checkpoints").glob("*.ckpt")):
        try:
            yield file, load(file)
        except CheckpointError as error:
            warnings.warn(f"{error}; it is passed over", stacklevel=2)


def settings_of(trainer: Orchestrator) -> dict[str, Any]:
    """What a resumed run must agree on with the run that made the checkpoint."""
    return {
        "algorithm": trainer.algorithm.name,
        **trainer.algorithm.settings(),
        "seed": trainer.seed,
        "clients": trainer.datamodule.num_clients,
        "clients_per_round": trainer.num_sampled,
        "simulation": trainer.simulation,
        "precision": trainer.precision,
        "server_schedule": trainer.server.scheduler is not None,
        "codec": asdict(trainer.codec),
        "availability": trainer.availability.settings(),
        "catch_up": asdict(trainer.catch_up),
    }


def collect(trainer: Orchestrator, weights_only: bool = False) -> dict[str, Any]:
    """What a resumed run needs; the module's own hook adds the tensors that are trained."""
    checkpoint: dict[str, Any] = {
        "global_step": trainer.global_step,
        "state_dict": {},
        "settings": settings_of(trainer),
        "fingerprint": trainer.lightning_module.fingerprint(),
        "validations": [asdict(one) for one in (trainer.result.first, trainer.result.last)] if trainer.result else [],
        # A run that was stopped early stays so, unless it is given more rounds.
        "stopped_of": trainer.max_rounds if trainer.should_stop else 0,
    }
    if not weights_only:
        scheduler = trainer.server.scheduler
        checkpoint["method"] = trainer.algorithm.state_dict()
        checkpoint["optimizer_states"] = [trainer.server.optimizer.state_dict()]
        checkpoint["lr_schedulers"] = [scheduler.state_dict()] if scheduler is not None else []
        checkpoint["refused"], checkpoint["attempts"] = dict(trainer.refused), list(trainer.attempts)
        checkpoint["history"] = trainer.history.state_dict(trainer.global_step)
        checkpoint["callbacks"] = {c.state_key: state for c in trainer.callbacks if (state := _state_of(c))}
    return checkpoint


def load_model(model: SplitModule, checkpoint: dict[str, Any]) -> None:
    """Copy the trained tensors in.

    Raises:
        CheckpointError: They were trained on another backbone.
        SplitError: Another cut or other adapters.
    """
    model.load_trained_state(checkpoint["state_dict"])
    if checkpoint["fingerprint"] != model.fingerprint():
        raise CheckpointError(
            f"ckpt_path: it was trained on other weights than those of model.init_args.pretrained={model.pretrained!r}"
        )


def restore(trainer: Orchestrator, checkpoint: dict[str, Any]) -> None:
    """Continue where the checkpoint was made.

    Raises:
        CheckpointError: Another method, other settings or another backbone, or no optimizer states.
    """
    mine, theirs = settings_of(trainer), checkpoint["settings"]
    for name in [*mine, *(theirs.keys() - mine.keys())]:
        if mine.get(name) != theirs.get(name):
            raise CheckpointError(
                f"ckpt_path: the run was made with {name}={theirs.get(name)}, the recipe says {mine.get(name)}; "
                "a resumed run keeps its settings"
            )
    if "method" not in checkpoint:
        raise CheckpointError("ckpt_path: holds weights only, so a run cannot continue from it")
    load_model(trainer.lightning_module, checkpoint)
    trainer.algorithm.load_state_dict(checkpoint["method"])
    trainer.server.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    if trainer.server.scheduler is not None:
        trainer.server.scheduler.load_state_dict(checkpoint["lr_schedulers"][0])
    trainer.global_step = checkpoint["global_step"]
    trainer.refused, trainer.attempts = Counter(checkpoint["refused"]), list(checkpoint["attempts"])
    trainer.should_stop = trainer.max_rounds <= checkpoint["stopped_of"]
    if checkpoint["validations"]:
        first, last = (Evaluation(**one) for one in checkpoint["validations"])
        trainer.result = RunResult(first, last)
    trainer.call("on_load_checkpoint", checkpoint=checkpoint)
    for callback in trainer.callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            state = checkpoint["callbacks"][callback.state_key]
            callback.load_state_dict(state)
            vars(callback).update({name: state[name] for name in _left_out(callback)})


def _state_of(callback: Callback) -> dict[str, Any]:
    return callback.state_dict() | {name: getattr(callback, name) for name in _left_out(callback)}


def _left_out(callback: Callback) -> tuple[str, ...]:
    return _LEFT_OUT if isinstance(callback, ModelCheckpoint) else ()
