"""Padding never travels: (B, S, h) tensors as the coded rows of their valid tokens, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from hosfl_client.wire.errors import DtypeError, ShapeError
from hosfl_lightning.rng import Stream
from hosfl_lightning.wire.codecs import Coded


def pack_rows(kind: str, name: str, x: Tensor, mask: Tensor, codec: str, stream: Stream, tensor: int) -> Coded:
    """The rows of ``x`` (B, S, h) where ``mask`` (B, S) is True, row-major and coded.

    Where nothing is padded they are ``x`` itself, as its codec leaves it: who packs does not change it afterwards.

    Raises:
        FieldError: Shapes that do not fit, a mask that is not bool, or an unknown codec.
    """
    if mask.dtype != torch.bool:
        raise DtypeError(f"{kind}: the mask must be bool (attention_mask.bool()), got {mask.dtype}")
    if mask.dim() != 2 or x.dim() != 3 or x.shape[:2] != mask.shape:
        raise ShapeError(
            f"{kind}: {name} must be (B, S, h) and the mask (B, S), got {tuple(x.shape)} and {tuple(mask.shape)}"
        )
    rows = x.reshape(-1, x.shape[-1]) if mask.all() else x[mask]  # without padding there is nothing to copy
    return Coded.of(rows, codec, stream, tensor)


def unpack_rows(kind: str, coded: Coded, mask: Tensor) -> Tensor:
    """The reverse of `pack_rows`: (B, S, h) with zeros at padding.

    Raises:
        ShapeError: The mask has another number of valid tokens than there are rows.
    """
    rows, valid = len(coded.values), int(mask.sum())
    if rows != valid:
        raise ShapeError(f"{kind}: {rows} rows for a mask of {valid} valid tokens")
    restored = coded.restore()
    if valid == mask.numel():  # a copy as well: what is in the message may be its sender's
        return (restored.clone() if restored is coded.values else restored).view(*mask.shape, restored.shape[1])
    padded = restored.new_zeros(*mask.shape, restored.shape[1])
    padded[mask] = restored
    return padded
