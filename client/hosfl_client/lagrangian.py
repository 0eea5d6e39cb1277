"""The Lagrangian's client term, in chunks: neither z nor λ is ever held in fp64, and λ stays as it came."""

from __future__ import annotations

from typing import Any

import numpy as np

from hosfl_client.codecs import Coded

#: Elements that are widened to fp64 at a time: 256 KiB each of z and λ.
WIDENED = 1 << 15


def lagrangian_term(z: np.ndarray[Any, Any], multiplier: Coded, mask: np.ndarray[Any, Any]) -> float:
    r"""``⟨λ, z⟩`` in fp64, in which products of two fp32 numbers are exact.

    Args:
        z: ``(B, S, h)`` fp32.
        multiplier: λ at the ``n`` valid positions, as it travelled.
        mask: Valid positions, ``(B, S)`` bool.
    """
    rows = z.reshape(-1, z.shape[-1])
    valid = np.flatnonzero(mask)
    step, total = max(1, WIDENED // z.shape[-1]), 0.0
    for start in range(0, len(valid), step):
        stop = min(start + step, len(valid))
        part = rows[valid[start:stop]].astype(np.float64)
        part *= multiplier.restore_rows(start, stop)
        total += float(part.sum())
    return total


def multiplier_of(multiplier: Coded, mask: np.ndarray[Any, Any], first: int, last: int) -> np.ndarray[Any, Any]:
    """λ of examples ``first .. last − 1`` as ``(b, S, h)`` fp32, zero at padding."""
    start, stop = int(mask[:first].sum()), int(mask[:last].sum())
    padded = np.zeros((*mask[first:last].shape, multiplier.width), np.float32)
    padded[mask[first:last]] = multiplier.restore_rows(start, stop)
    return padded
