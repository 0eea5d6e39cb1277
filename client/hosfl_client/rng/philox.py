"""Philox4x32-10: 128 random bits as a pure function of a 128-bit counter and a 64-bit key.

One round maps the counter words (c0, c1, c2, c3) and the round's key (k0, k1) to

    (hi(M1·c2) ^ c1 ^ k0,  lo(M1·c2),  hi(M0·c0) ^ c3 ^ k1,  lo(M0·c0))

with hi and lo the upper and lower 32 bits of the 64-bit product; after each of the ten rounds the key advances by
(W0, W1).

Reference: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as in the Random123 library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hosfl_client.rng.streams import KEY_STEPS, MASK32, MULTIPLIERS, ROUNDS, Stream

BLOCKS = 4096
"""Blocks made in one call: 64 bytes of scratch each, so that all of it stays in a core's cache."""

U64 = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint32]


class Generator:
    """Words of several streams of one seed and round, in buffers that are reused from call to call.

    Args:
        capacity: Most blocks of one call, over all of its streams; 64 bytes of scratch each.
    """

    def __init__(self, capacity: int = BLOCKS) -> None:
        self._state = np.empty((3, 2, capacity), np.uint64)
        self._packed = np.empty((capacity, 2), "<u8")

    def __call__(self, streams: Sequence[Stream], blocks: U64, c1: int | U64) -> Words:
        """The four words of each block.

        Args:
            streams: ``m`` of them, that differ in client and probe alone.
            blocks: (n,) block indices, 40 bits.
            c1: `Stream.c1` of their tensor, or (n,) of each one's.

        Returns:
            (m, n, 4) uint32, little-endian; valid until the next call.
        """
        m, n = len(streams), len(blocks)
        even, odd, spare = self._state[:, :, : m * n]
        even[0].reshape(m, n)[:] = blocks & _MASK
        even[1].reshape(m, n)[:] = np.array([stream.c2 for stream in streams], np.uint64)[:, None]
        odd[0].reshape(m, n)[:] = blocks >> _SHIFT << np.array(24, np.uint64) | np.asarray(c1, np.uint64)
        odd[1] = streams[0].round
        even, odd = rounds(even, odd, spare, streams[0].key)
        packed = self._packed[: m * n]
        np.left_shift(odd, _SHIFT, odd)
        np.bitwise_or(even.T, odd.T, packed)
        return packed.view("<u4").reshape(m, n, 4)


def rounds(even: U64, odd: U64, spare: U64, key: tuple[int, int]) -> tuple[U64, U64]:
    """The ten rounds, in place.

    A round leaves its two products in each other's place, so the lanes swap every round and are back after ten.

    Args:
        even: (2, n) (c0, c2); overwritten.
        odd: (2, n) (c1, c3); overwritten.
        spare: (2, n) scratch.
        key: (k0, k1).

    Returns:
        Words 0 and 2; words 1 and 3 in the lower 32 bits, where the upper 32 are arbitrary.
    """
    multiply, xor = np.multiply, np.bitwise_xor
    even0, even1 = even
    (odd0, odd1), (spare0, spare1) = odd, spare
    for multiplier0, multiplier1, key0, key1 in _schedule(*key):
        # Lane by lane where the lanes' numbers differ: numpy is twice as fast with a scalar as with a column.
        multiply(even0, multiplier0, spare0)
        multiply(even1, multiplier1, spare1)
        np.right_shift(spare, _SHIFT, even)
        xor(even0, odd1, even0)
        xor(even1, odd0, even1)
        xor(even0, key0, even0)
        xor(even1, key1, even1)
        np.bitwise_and(even, _MASK, even)
        odd, odd0, odd1, spare, spare0, spare1 = spare, spare0, spare1, odd, odd0, odd1
    return even, odd


# Arrays without dimensions: a Python number or a numpy scalar is converted at every call.
_SHIFT, _MASK = np.array(32, np.uint64), np.array(MASK32, np.uint64)


@lru_cache(maxsize=8)
def _schedule(k0: int, k1: int) -> list[list[U64]]:
    """Multipliers and keys of the ten rounds, in the lane order of :func:`rounds`."""
    schedule = []
    for r in range(ROUNDS):
        keys = ((k1 + r * KEY_STEPS[1]) & MASK32, (k0 + r * KEY_STEPS[0]) & MASK32)
        swap = -1 if r % 2 else 1
        schedule.append([np.array(number, np.uint64) for number in (*MULTIPLIERS[::swap], *keys[::swap])])
    return schedule
