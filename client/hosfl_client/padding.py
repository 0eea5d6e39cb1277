"""Padding never travels: (B, S, h) arrays as the coded rows of their valid tokens, and back."""

from __future__ import annotations

import numpy as np

from hosfl_client.bfloat16 import DTYPES, Array
from hosfl_client.codecs import ELEMENTS, Coded
from hosfl_client.rng import Domain, Stream
from hosfl_client.wire.checks import check_step
from hosfl_client.wire.errors import DtypeError, ShapeError


def rounding_stream(kind: str, seed: int, round: int, client: int, step: int) -> Stream:
    """The noise of what client k sends or is sent in a local step of a round; the step takes the probe's place.

    Raises:
        FieldError: A step that the counter does not hold.
    """
    check_step(kind, step)
    return Stream(seed, Domain.ROUNDING, round, client, step)


def pack_rows(kind: str, name: str, x: Array, mask: Array, codec: str, stream: Stream, tensor: int) -> Coded:
    """The rows of ``x`` (B, S, h) where ``mask`` (B, S) is True, row-major and coded.

    Where nothing is padded they are ``x`` itself, as its codec leaves it: who packs does not change it afterwards.

    Raises:
        FieldError: Shapes that do not fit, a mask that is not bool, or an unknown codec.
    """
    if mask.dtype != np.bool_:
        raise DtypeError(f"{kind}: the mask must be bool (attention_mask.astype(bool)), got {mask.dtype}")
    if mask.ndim != 2 or x.ndim != 3 or x.shape[:2] != mask.shape:
        raise ShapeError(f"{kind}: {name} must be (B, S, h) and the mask (B, S), got {x.shape} and {mask.shape}")
    rows = x.reshape(-1, x.shape[-1]) if mask.all() else x[mask]  # without padding there is nothing to copy
    return Coded.of(rows, codec, stream, tensor)


def unpack_rows(kind: str, coded: Coded, mask: Array) -> Array:
    """The reverse of `pack_rows`: (B, S, h) with zeros at padding, restored some rows at a time.

    Raises:
        ShapeError: The mask has another number of valid tokens than there are rows.
    """
    rows, valid = len(coded.values), int(mask.sum())
    if rows != valid:
        raise ShapeError(f"{kind}: {rows} rows for a mask of {valid} valid tokens")
    padded = np.zeros((mask.size, coded.width), DTYPES[coded.dtype])
    if valid == mask.size:
        coded.restore(padded)
    else:
        places, step = np.flatnonzero(mask), max(1, ELEMENTS // coded.width)
        for start in range(0, valid, step):
            stop = min(start + step, valid)
            padded[places[start:stop]] = coded.restore_rows(start, stop)
    return padded.reshape(*mask.shape, coded.width)
