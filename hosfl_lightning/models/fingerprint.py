"""Which backbone it is: SHA-256 over frozen tensors as bf16, so that any precision of one model gives the same."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

#: Elements that are copied at a time.
PIECE = 1 << 20
ALL_TRAINED = "all trained"


def of_first(frozen: list[Tensor]) -> str:
    """Of one tensor."""
    return sha256(_bits(frozen[0].detach())).hexdigest() if frozen else ALL_TRAINED


def of_all(frozen: Mapping[str, Tensor]) -> str:
    """Of all of them, in order, each with its name and shape; no more than `PIECE` elements are copied at a time."""
    if not frozen:
        return ALL_TRAINED
    digest = sha256()
    for name, tensor in frozen.items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for piece in tensor.detach().reshape(-1).split(PIECE):
            digest.update(_bits(piece))
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Any:
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
