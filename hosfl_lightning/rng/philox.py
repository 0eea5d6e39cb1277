"""Philox4x32-10: 128 random bits as a pure function of a 128-bit counter and a 64-bit key.

One round maps the counter words (c0, c1, c2, c3) and the round's key (k0, k1) to

    (hi(M1·c2) ^ c1 ^ k0,  lo(M1·c2),  hi(M0·c0) ^ c3 ^ k1,  lo(M0·c0))

with hi and lo the upper and lower 32 bits of the 64-bit product; after each of the ten rounds the key advances by
(W0, W1). Everything is int64 arithmetic modulo 2^64 followed by shifts, so the bits do not depend on device, endianness
or threads.

Reference: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as in the Random123 library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hosfl_client.rng.streams import (
    BLOCK_BITS,
    KEY_STEPS,
    MASK32,
    MULTIPLIERS,
    ROUNDS,
    TENSOR_BITS,
    Stream,
    check_range,
)


@lru_cache(maxsize=32)
def _schedule(k0: int, k1: int, device: torch.device) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor]:
    """Multipliers and keys of the ten rounds in the lane order of :func:`rounds_`, the mask and the shift.

    All are (2, 1) tensors: to torch a Python number costs as much again as a small operation.
    """
    multipliers = [MULTIPLIERS if r % 2 == 0 else MULTIPLIERS[::-1] for r in range(ROUNDS)]
    keys = [((k0 + r * KEY_STEPS[0]) & MASK32, (k1 + r * KEY_STEPS[1]) & MASK32) for r in range(ROUNDS)]
    keys = [key[::-1] if r % 2 == 0 else key for r, key in enumerate(keys)]
    rows = [*multipliers, *keys, (MASK32, MASK32), (32, 32)]
    constants = torch.tensor(rows, device=device).unsqueeze(-1).unbind()
    return constants[:ROUNDS], constants[ROUNDS:-2], constants[-2], constants[-1]


def rounds_(even: Tensor, odd: Tensor, spare: Tensor, key: tuple[int, int]) -> None:
    """The ten rounds, in place, on both multiplications at once.

    A round leaves its two products in each other's place, so the lanes swap every round and are back after ten.

    Args:
        even: (2, n) int64, (c0, c2) holding uint32; overwritten by words 0 and 2.
        odd: (2, n) int64, (c1, c3); overwritten by words 1 and 3 in the lower 32 bits, the upper 32 are arbitrary.
        spare: (2, n) int64 scratch.
        key: (k0, k1).
    """
    multipliers, keys, mask, shift = _schedule(*key, even.device)
    even0, even1 = even.unbind()
    (odd0, odd1), (spare0, spare1) = odd.unbind(), spare.unbind()
    for multiplier, round_key in zip(multipliers, keys):
        torch.mul(even, multiplier, out=spare)
        torch.bitwise_right_shift(spare, shift, out=even)
        even0.bitwise_xor_(odd1)
        even1.bitwise_xor_(odd0)
        even.bitwise_xor_(round_key).bitwise_and_(mask)
        odd, odd0, odd1, spare, spare0, spare1 = spare, spare0, spare1, odd, odd0, odd1


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four counter words.

    Args:
        c0: Counter word 0, int64 tensor holding uint32; c1, c2 and c3 likewise, all of one shape.
        c1: Counter word 1.
        c2: Counter word 2.
        c3: Counter word 3.
        k0: Lower key word, 0 <= k0 < 2^32.
        k1: Upper key word.

    Returns:
        The four output words in Random123's order, int64 tensors holding uint32, in the counters' shape.
    """
    check_range("k0", k0, 1 << 32)
    check_range("k1", k1, 1 << 32)
    even, odd = torch.stack([c0, c2]), torch.stack([c1, c3])
    rounds_(even, odd, torch.empty_like(even), (k0, k1))
    odd.bitwise_and_(MASK32)
    return even[0], odd[0], even[1], odd[1]


def check_indices(name: str, indices: Tensor, stop: int) -> None:
    """Raise unless ``indices`` is a 1-D int64 tensor of values with 0 <= value < stop; waits for the device."""
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise TypeError(f"{name} must be a 1-D int64 tensor, got shape {tuple(indices.shape)}, {indices.dtype}")
    if indices.numel() and not bool(((indices >= 0) & (indices < stop)).all()):
        raise ValueError(f"{name} must be within 0 <= value < {stop}")


def words(stream: Stream, tensor: int, blocks: Tensor) -> Tensor:
    """The four words of each block of one tensor.

    Args:
        stream: Key and the rest of the counter.
        tensor: Index in the manifest of trainable tensors, 16 bits.
        blocks: (n,) int64 block indices, 40 bits.

    Returns:
        (n, 4) int64 holding uint32, on the device of ``blocks``.

    Raises:
        ValueError: ``tensor`` or a block is out of range.
        TypeError: ``blocks`` is not 1-D int64.
    """
    check_range("tensor", tensor, 1 << TENSOR_BITS)
    check_indices("blocks", blocks, 1 << BLOCK_BITS)
    c0, c1 = blocks & MASK32, blocks >> 32 << 24 | stream.c1(tensor)
    c2, c3 = torch.full_like(c0, stream.c2), torch.full_like(c0, stream.c3)
    return torch.stack(philox4x32(c0, c1, c2, c3, *stream.key), dim=-1)


class WordGenerator:
    """Packed words of one stream, in buffers that are reused from call to call.

    Args:
        stream: Key and the rest of the counter.
        capacity: Most blocks of one call; 64 bytes of scratch each.
        device: Where the words are made.
    """

    def __init__(self, stream: Stream, capacity: int, device: torch.device) -> None:
        self.stream = stream
        self._state = torch.empty(3, 2, capacity, dtype=torch.int64, device=device)
        self._packed = torch.empty(capacity, 4, dtype=torch.int32, device=device)

    def __call__(self, c0: Tensor, c1: int | Tensor, out: Tensor | None = None) -> Tensor:
        """The bit patterns of the words of the blocks with these counters.

        Args:
            c0: (n,) int64, counter word 0.
            c1: Counter word 1, one for all blocks or (n,) int64.
            out: (n, 4) int32 to be filled; a buffer that is valid until the next call if ``None``.

        Returns:
            (n, 4) int32.
        """
        n = len(c0)
        out = self._packed[:n] if out is None else out
        even, odd, spare = self._state[:, :, :n].unbind()
        (even0, even1), (odd0, odd1) = even.unbind(), odd.unbind()
        even0.copy_(c0)
        odd0.copy_(c1) if isinstance(c1, Tensor) else odd0.fill_(c1)
        even1.fill_(self.stream.c2)
        odd1.fill_(self.stream.c3)
        rounds_(even, odd, spare, self.stream.key)
        for word, lane in zip(out.unbind(1), (even0, odd0, even1, odd1)):
            word.copy_(lane)
        return out
