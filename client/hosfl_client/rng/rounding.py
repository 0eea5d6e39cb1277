"""Uniform numbers for stochastic rounding."""

from __future__ import annotations

import numpy as np

from hosfl_client.bfloat16 import Floats
from hosfl_client.rng.philox import BLOCKS, Generator
from hosfl_client.rng.streams import BLOCK_BITS, Stream, check_range

LOG2_BLOCK = 3


class Uniform16:
    """r_e = (h_e + 1/2)/65536 of the elements e of one tensor, with h_e the 16 bits of gauss16's layout:

        block e >> 3, word (e >> 1) & 3, h = (word >> 16·(e & 1)) & 0xFFFF

    The half makes the mean over all h exactly 1/2, so that E floor(x + r) = x up to 2^-17. r is exact in fp32.

    Args:
        stream: Key and the rest of the counter.
        tensor: Which tensor of the stream, 16 bits.

    Raises:
        ValueError: ``tensor`` is out of range.
    """

    def __init__(self, stream: Stream, tensor: int) -> None:
        self.stream, self.c1 = stream, stream.c1(tensor)
        self._generator = Generator(BLOCKS)

    def fill(self, out: Floats, start: int = 0) -> Floats:
        """Elements from ``start`` on, as many as ``out``, contiguous and 1-D, holds.

        Raises:
            ValueError: An element is out of range.
        """
        check_range("start", start, (1 << BLOCK_BITS + LOG2_BLOCK) - len(out) + 1)
        stop = start + len(out)
        for begin in range(start >> LOG2_BLOCK, (stop - 1 >> LOG2_BLOCK) + 1, BLOCKS):
            end = min(begin + BLOCKS, (stop - 1 >> LOG2_BLOCK) + 1)
            words = self._generator([self.stream], np.arange(begin, end, dtype=np.uint64), self.c1)
            low, high = max(start, begin << LOG2_BLOCK), min(stop, end << LOG2_BLOCK)
            first = low - (begin << LOG2_BLOCK)
            out[low - start : high - start] = words.reshape(-1).view("<u2")[first : first + high - low]
        np.add(out, np.float32(0.5), out=out)
        return np.multiply(out, np.float32(2**-16), out=out)


def uniform16(stream: Stream, tensor: int, count: int, start: int = 0) -> Floats:
    """(count,) float32, 0 < r < 1: elements ``start .. start + count - 1`` of `Uniform16`."""
    check_range("count", count, (1 << BLOCK_BITS + LOG2_BLOCK) + 1)
    return Uniform16(stream, tensor).fill(np.empty(count, np.float32), start)
