"""What takes seconds to make and is the same every time, kept in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hosfl_lightning.files import write_whole
from hosfl_lightning.rendering import process

#: A folder to take instead of ``~/.cache/hosfl_lightning``; empty: nothing is kept.
VARIABLE = "HOSFL_CACHE"

Tensors = Mapping[str, Tensor]


def folder() -> Path | None:
    """Where it is kept; None: nowhere."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hosfl_lightning"


def cached(name: str, key: str, make: Callable[[], dict[str, Tensor]]) -> Tensors:
    """What ``make`` makes, from the cache if it is there whole and of this key, else made and kept.

    Args:
        name: Of the file, which a later key replaces.
        key: Of all it is made of.
        make: Tensors by name.
    """
    within = folder()
    path = None if within is None else within / f"{name}.safetensors"
    found = None if path is None else _read(path, key)
    if found is not None:
        return found
    made = make()
    if path is not None and not process():
        with suppress(OSError):  # a home that cannot be written to is no reason to end a run
            write_whole(path, lambda file: file.write(save(made, {"key": key, "digest": _digest(made)})))
    return made


def _read(path: Path, key: str) -> Tensors | None:
    """None: it is not there, of something else, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if told.get("key") != key:
                return None
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return found if told.get("digest") == _digest(found) else None


def _digest(tensors: Tensors) -> str:
    """Of names, shapes, types and bytes."""
    hashed = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
