"""What a client keeps on its disk, of torch's tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from hosfl_client import own_state
from hosfl_client.own_state import KEPT
from hosfl_lightning.files import discard, write_whole

__all__ = ["KEPT", "OwnState"]


class _Torch:
    def dump(self, state: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
        return safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in state.items()}, metadata=metadata)

    def load(self, data: bytes) -> dict[str, Tensor]:
        return safetensors.torch.load(data)

    def write(self, path: Path, data: bytes) -> None:
        write_whole(path, lambda file: file.write(data))


class OwnState(own_state.OwnState):
    """See `hosfl_client.own_state.OwnState`.

    Args:
        folder: Made when it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder, _Torch(), discard)
