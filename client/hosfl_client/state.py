"""Arrays of numpy as files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from hosfl_client.bfloat16 import Array


class NumpyStorage:
    """What `hosfl_client.own_state.OwnState` asks of an engine; what is held is fp32, θ_c and moments."""

    def dump(self, state: Mapping[str, Array], metadata: dict[str, str]) -> bytes:
        """A safetensors file."""
        from safetensors.numpy import save

        return save({name: np.ascontiguousarray(array) for name, array in state.items()}, metadata=metadata)

    def load(self, data: bytes) -> dict[str, Array]:
        """The arrays of a safetensors file."""
        from safetensors.numpy import load

        return load(data)

    def write(self, path: Path, data: bytes) -> None:
        """See `write_whole`."""
        write_whole(path, data)


def write_whole(path: Path, data: bytes) -> None:
    """Temporary file beside ``path``, fsync, rename, fsync of the folder: a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # others open no folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
