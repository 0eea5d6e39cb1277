"""Checkpoints that are written whole or not at all, and read without pickle."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hosfl_lightning.files import write_whole
from hosfl_lightning.models import SplitModule

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
    for file in sorted((folder / "checkpoints").rglob("*.ckpt")):
        try:
            yield file, load(file)
        except CheckpointError as error:
            warnings.warn(f"{error}; it is passed over", stacklevel=2)


def load_model(model: SplitModule, checkpoint: dict[str, Any]) -> None:
    """Copy the trained tensors in.

    Raises:
        CheckpointError: They were trained on another backbone, or with the classes in another order.
        SplitError: Another cut or other adapters.
    """
    names = checkpoint.get("label_names")
    if names is not None and model.label_names is None:
        model.name_labels(names)
    elif names is not None and list(names) != model.label_names:
        one, other = next((a, b) for a, b in zip_longest(names, model.label_names or ()) if a != b)
        raise CheckpointError(
            f"ckpt_path: it was trained with other classes than the data has: {one!r} is {other!r} there; set "
            "data.init_args.labels to the labels.json of the run"
        )
    model.load_trained_state(checkpoint["state_dict"])
    if checkpoint["fingerprint"] != model.fingerprint():
        raise CheckpointError(
            f"ckpt_path: it was trained on other weights than those of model.init_args.pretrained={model.pretrained!r}"
        )


def callback_states(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """What callbacks go on from, by their keys."""
    return {one.state_key: state for one in callbacks if (state := _state_of(one))}


def restore_callbacks(callbacks: Sequence[Callback], states: dict[str, Any]) -> None:
    """Continue from `callback_states`."""
    for callback in callbacks:
        if callback.state_key in states:
            state = states[callback.state_key]
            callback.load_state_dict(state)
            vars(callback).update({name: state[name] for name in _left_out(callback)})


def _state_of(callback: Callback) -> dict[str, Any]:
    return callback.state_dict() | {name: getattr(callback, name) for name in _left_out(callback)}


def _left_out(callback: Callback) -> tuple[str, ...]:
    return _LEFT_OUT if isinstance(callback, ModelCheckpoint) else ()
