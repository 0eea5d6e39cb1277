"""Checkpoints that are written whole or not at all, and read without pickle."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """The file is not a checkpoint of this run's model and method."""


def save(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write to a temporary file beside ``path``, fsync, rename, fsync the folder: a kill leaves the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


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
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(f"ckpt_path: {str(path)!r} is not a whole, plain checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "global_step", "algorithm"} <= set(checkpoint):
        raise CheckpointError(f"ckpt_path: {str(path)!r} was not written by the Orchestrator")
    return checkpoint


def fsync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
