"""Uniform numbers for stochastic rounding, from 16 bits each of the counter-based generator."""

from __future__ import annotations

import torch
from torch import Tensor

from hosfl_client.rng.streams import BLOCK_BITS, MASK32, TENSOR_BITS, Stream, check_range
from hosfl_lightning.rng.directions import CHUNK_BLOCKS
from hosfl_lightning.rng.philox import WordGenerator

LOG2_BLOCK = 3


def uniform16(stream: Stream, tensor: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """r_e = (h_e + 1/2)/65536 of elements e = 0 .. count - 1, with h_e the 16 bits of gauss16's layout:

        block e >> 3, word (e >> 1) & 3, h = (word >> 16·(e & 1)) & 0xFFFF

    The half makes the mean over all h exactly 1/2, so that E floor(x + r) = x up to 2^-17. r is exact in fp32.

    Args:
        stream: Key and the rest of the counter.
        tensor: Which tensor of the stream, 16 bits.
        count: Number of elements.
        device: Where; the CPU if ``None``.

    Returns:
        (count,) fp32, 0 < r < 1.

    Raises:
        ValueError: ``tensor`` or ``count`` is out of range.
    """
    check_range("tensor", tensor, 1 << TENSOR_BITS)
    check_range("count", count, (1 << BLOCK_BITS + LOG2_BLOCK) + 1)
    device = torch.device("cpu" if device is None else device)
    r = torch.empty(count, dtype=torch.float32, device=device)
    blocks = count + (1 << LOG2_BLOCK) - 1 >> LOG2_BLOCK
    generator = WordGenerator(stream, min(CHUNK_BLOCKS, blocks), device)
    # CHUNK_BLOCKS divides 2^32, so the upper bits of the block are the same for a whole chunk.
    for begin in range(0, blocks, CHUNK_BLOCKS):
        c0 = torch.arange(begin & MASK32, (begin & MASK32) + min(CHUNK_BLOCKS, blocks - begin), device=device)
        packed = generator(c0, stream.c1(tensor, begin)).view(-1)
        part = r[begin << LOG2_BLOCK : begin + CHUNK_BLOCKS << LOG2_BLOCK]
        part[0::2] = packed[: len(part) + 1 >> 1] & 0xFFFF
        part[1::2] = packed[: len(part) >> 1] >> 16 & 0xFFFF
    return r.add_(0.5).mul_(2**-16)
