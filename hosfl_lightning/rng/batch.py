"""Directions of many small tensors from one call of the generator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from hosfl_client.rng.distributions import LOG2_BLOCK, check_distribution
from hosfl_client.rng.streams import TENSOR_BITS, Stream, check_range
from hosfl_lightning.rng.directions import CHUNK_BLOCKS, add_scaled_, addend
from hosfl_lightning.rng.distributions import Expander, round_coefficient
from hosfl_lightning.rng.philox import WordGenerator

RUN = 1 << 16
"""Elements expanded at once: 256 KiB."""

WINDOW = 1 << 16
"""Blocks whose words are held at a time: 1 MiB."""

KEPT = 1 << 12
"""Blocks of a batch whose words outlive it, 64 KiB, and serve the next batch alike: the other side of a probe, the next
client, the update. Of the last 16 such batches."""


class DirectionBatch:
    """Directions of many small tensors, generated together and held as packed words.

    A generator call costs about as much for 1,024 blocks as for 32, so small tensors share one. Held are 1 bit per
    element (Rademacher) or 16 (gauss16), padded to whole blocks of 128 bits, of one window of blocks at a time; one run
    of blocks is expanded to fp32, so :meth:`add_` is fastest in the order of the tensors. Once each tensor had its turn
    nothing is held until the next turn. The elements are those of :func:`direction`.

    Args:
        stream: Which direction; its domain is the distribution.
        tensors: (index in the manifest of trainable tensors, number of elements) of each.
        device: Where; the CPU if ``None``.

    Raises:
        ValueError: An index or a size is out of range, or the stream's domain has no directions.
    """

    def __init__(
        self, stream: Stream, tensors: Sequence[tuple[int, int]], device: torch.device | str | None = None
    ) -> None:
        check_distribution(stream.domain)
        self.stream, self.tensors = stream, list(tensors)
        self.device = torch.device("cpu" if device is None else device)
        self._log2 = LOG2_BLOCK[stream.domain]
        self._first = _first_blocks(self._log2, tuple(self.tensors))
        self._expand = Expander(stream.domain, self.device)
        self._size = max(min(RUN >> self._log2, self._first[-1]), 1)
        self._release()

    def _release(self) -> None:
        self._due = set(range(len(self.tensors)))
        self._window, self._run = range(0), range(0)
        self._packed = self._expanded = torch.empty(0, device=self.device)

    def add_(self, i: int, out: Tensor, alpha: float | Tensor) -> None:
        """In place and unseen by autograd, out <- out + α·u of the i-th tensor.

        Args:
            i: Position in ``tensors``.
            out: (numel,) contiguous fp32.
            alpha: As in :func:`add_direction_`.

        Raises:
            ValueError: ``out`` has another size than the i-th tensor, or α is not finite.
            TypeError: ``out`` is not a contiguous 1-D fp32 tensor.
        """
        out, n = addend(out), self.tensors[i][1]
        if out.numel() != n:
            raise ValueError(f"out must have the {n} elements of tensor {i}, got {out.numel()}")
        if not isinstance(alpha, Tensor):
            alpha = round_coefficient(alpha, self.stream.domain)
        position = 0
        while position < n:
            block = self._first[i] + (position >> self._log2)
            expanded = self._expanded if block in self._run else self._expand_run(block)
            start = block - self._run.start << self._log2
            count = min(n - position, (len(self._run) << self._log2) - start)
            part = out if count == n else out[position : position + count]
            add_scaled_(part, expanded[start : start + count], alpha)
            position += count
        self._due.discard(i)
        if not self._due:
            self._release()

    def _expand_run(self, block: int) -> Tensor:
        if block not in self._window:
            self._window, self._packed = self._words(block)
        self._run = range(block, min(block + self._size, self._window.stop))
        if not self._expanded.numel():
            self._expanded = torch.empty(self._size << self._log2, dtype=torch.float32, device=self.device)
        words = self._packed[block - self._window.start :][: len(self._run)]
        self._expand(words, self._expanded[: len(self._run) << self._log2])
        return self._expanded

    def _words(self, block: int) -> tuple[range, Tensor]:
        """The window of a block, and its words."""
        total, tensors = self._first[-1], tuple(self.tensors)
        if total <= KEPT:
            return range(total), _kept_words(self.stream, tensors, self.device)
        begin = block // WINDOW * WINDOW
        window = range(begin, min(begin + WINDOW, total))
        return window, _words(self.stream, tensors, self.device, window)

    def joined(self) -> Tensor:
        """The directions of all tensors one after another, fp32, new each time."""
        whole = torch.empty(self._first[-1] << self._log2, dtype=torch.float32, device=self.device)
        for begin in range(0, self._first[-1], WINDOW):
            window, words = self._words(begin)
            self._expand(words, whole[window.start << self._log2 : window.stop << self._log2])
        if len(whole) == sum(numel for _, numel in self.tensors):
            return whole
        starts = [first << self._log2 for first in self._first]
        return torch.cat([whole[start : start + numel] for start, (_, numel) in zip(starts, self.tensors)])

    def get(self, i: int) -> Tensor:
        """The i-th tensor's direction, (numel,) fp32."""
        u = torch.zeros(self.tensors[i][1], dtype=torch.float32, device=self.device)
        self.add_(i, u, 1.0)
        return u


@lru_cache(maxsize=16)
def _first_blocks(log2: int, tensors: tuple[tuple[int, int], ...]) -> list[int]:
    """The first block of each tensor, and the number of all."""
    for tensor, numel in tensors:
        check_range("tensor", tensor, 1 << TENSOR_BITS)
        check_range("numel", numel, (1 << 32 + log2) + 1)
    return [0, *accumulate((numel - 1 >> log2) + 1 for _, numel in tensors)]


@lru_cache(maxsize=16)
def _kept_words(stream: Stream, tensors: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    blocks = range(_first_blocks(LOG2_BLOCK[stream.domain], tensors)[-1])
    return _words(stream, tensors, device, blocks)


def _words(stream: Stream, tensors: Sequence[tuple[int, int]], device: torch.device, blocks: range) -> Tensor:
    """(len(blocks), 4) int32, numbered through all tensors."""
    starts = _first_blocks(LOG2_BLOCK[stream.domain], tuple(tensors))
    table = torch.tensor([starts[:-1], [stream.c1(tensor) for tensor, _ in tensors]], dtype=torch.int64, device=device)
    stops = torch.tensor(starts[1:], dtype=torch.int64, device=device)
    packed = torch.empty(len(blocks), 4, dtype=torch.int32, device=device)
    generator = WordGenerator(stream, min(CHUNK_BLOCKS, len(blocks)), device)
    for begin in range(blocks.start, blocks.stop, CHUNK_BLOCKS):
        position = torch.arange(begin, min(begin + CHUNK_BLOCKS, blocks.stop), device=device)
        owner = torch.bucketize(position, stops, right=True)
        first_of_owner, c1_of_owner = table.index_select(1, owner).unbind()
        start = begin - blocks.start
        generator(position.sub_(first_of_owner), c1_of_owner, out=packed[start : start + len(position)])
    return packed
