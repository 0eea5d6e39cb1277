"""The Lagrangian's client term, in chunks: neither z nor λ is ever held in fp64, and λ stays as it came."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hosfl_client.codecs import Coded

#: Elements that are widened to fp64 at a time: 256 KiB each of z and λ.
WIDENED = 1 << 15


class LagrangianTerm:
    r"""``z ↦ ⟨λ, z⟩`` in fp64, in which products of two fp32 numbers are exact; λ stays the same from probe to probe.

    Args:
        multiplier: λ at the ``n`` valid positions, as it travelled; what is no more than `WIDENED` is restored once.
        mask: Valid positions, ``(B, S)`` bool.
    """

    def __init__(self, multiplier: Coded, mask: np.ndarray[Any, Any]) -> None:
        self.multiplier = multiplier
        self.examples, self.lengths = len(mask), mask.sum(1)
        self.valid = None if mask.all() else np.flatnonzero(mask)  # without padding there is nothing to gather
        self.step = max(1, WIDENED // multiplier.width)
        self._widened = [*self._parts()] if len(multiplier.values) <= self.step else None

    def __call__(self, z: np.ndarray[Any, Any]) -> float:
        """Of ``z (B, S, h)`` fp32."""
        rows, total = z.reshape(-1, z.shape[-1]), 0.0
        for start, factor in self._widened or self._parts():
            chosen: Any = slice(start, start + len(factor))
            if self.valid is not None:
                chosen = self.valid[chosen]
            total += float(np.vdot(rows[chosen].astype(np.float64), factor))
        return total

    def each(self, z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Of every example of z by itself, ``(B,)``."""
        rows, owners = z.reshape(-1, z.shape[-1]), np.repeat(np.arange(self.examples), self.lengths)
        totals = np.zeros(self.examples)
        for start, factor in self._widened or self._parts():
            part = slice(start, start + len(factor))
            chosen: Any = part if self.valid is None else self.valid[part]
            np.add.at(totals, owners[part], (rows[chosen].astype(np.float64) * factor).sum(1))
        return totals

    def _parts(self) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        rows = len(self.multiplier.values)
        for start in range(0, rows, self.step):
            stop = min(start + self.step, rows)
            yield start, self.multiplier.restore_rows(start, stop).astype(np.float64)


def multiplier_of(multiplier: Coded, mask: np.ndarray[Any, Any], first: int, last: int) -> np.ndarray[Any, Any]:
    """λ of examples ``first .. last − 1`` as ``(b, S, h)`` fp32, zero at padding."""
    start, stop = int(mask[:first].sum()), int(mask[:last].sum())
    padded = np.zeros((*mask[first:last].shape, multiplier.width), np.float32)
    padded[mask[first:last]] = multiplier.restore_rows(start, stop)
    return padded
