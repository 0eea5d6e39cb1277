"""Directions of many small tensors from one call of the generator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from hosfl_client.rng.distributions import LOG2_BLOCK, check_distribution
from hosfl_client.rng.streams import TENSOR_BITS, Stream, check_range
from hosfl_lightning.rng.directions import CHUNK_BLOCKS, add_scaled_, addend
from hosfl_lightning.rng.distributions import Expander, round_coefficient
from hosfl_lightning.rng.philox import WordGenerator

RUN = 1 << 16
"""Elements expanded at once: 256 KiB that live as long as the batch."""


class DirectionBatch:
    """Directions of many small tensors, generated together and kept as packed words.

    A generator call costs about as much for 1,024 blocks as for 32, so small tensors share one. Kept are 1 bit per
    element (Rademacher) or 16 (gauss16), padded to whole blocks of 128 bits; one run of blocks is expanded to fp32 at a
    time, so :meth:`add_` is fastest in the order of the tensors. The elements are those of :func:`direction`.

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
        for tensor, numel in self.tensors:
            check_range("tensor", tensor, 1 << TENSOR_BITS)
            check_range("numel", numel, (1 << 32 + self._log2) + 1)
        counts = [(numel - 1 >> self._log2) + 1 for _, numel in self.tensors]
        self._first = [0, *accumulate(counts)]
        self._packed = self._generate()
        self._expand = Expander(stream.domain, self.device)
        self._size = min(RUN >> self._log2, len(self._packed))
        self._buffer: Tensor | None = None
        self._run = range(0)

    def _generate(self) -> Tensor:
        first, total = self._first[:-1], self._first[-1]
        c1 = [self.stream.c1(tensor) for tensor, _ in self.tensors]
        table = torch.tensor([first, c1], dtype=torch.int64, device=self.device)
        stops = torch.tensor(self._first[1:], dtype=torch.int64, device=self.device)
        packed = torch.empty(total, 4, dtype=torch.int32, device=self.device)
        chunk = min(CHUNK_BLOCKS, total)
        generator = WordGenerator(self.stream, chunk, self.device)
        for begin in range(0, total, CHUNK_BLOCKS):
            position = torch.arange(begin, min(begin + chunk, total), device=self.device)
            owner = torch.bucketize(position, stops, right=True)
            first_of_owner, c1_of_owner = table.index_select(1, owner).unbind()
            generator(position.sub_(first_of_owner), c1_of_owner, out=packed[begin : begin + chunk])
        return packed

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
        out = addend(out)
        if out.numel() != self.tensors[i][1]:
            raise ValueError(f"out must have the {self.tensors[i][1]} elements of tensor {i}, got {out.numel()}")
        if not isinstance(alpha, Tensor):
            alpha = round_coefficient(alpha, self.stream.domain)
        run = self._size << self._log2
        for position in range(0, out.numel(), max(run, 1)):
            target = out[position : position + run]
            block = self._first[i] + (position >> self._log2)
            add_scaled_(target, self._elements(block, target.numel()), alpha)

    def _elements(self, block: int, n: int) -> Tensor:
        """The first ``n`` elements from a block on, from the run of blocks that is expanded."""
        if self._buffer is None:
            self._buffer = torch.empty(self._size << self._log2, dtype=torch.float32, device=self.device)
        start = block - self._run.start << self._log2
        if block not in self._run or start + n > len(self._run) << self._log2:
            words = self._packed[block : block + self._size]
            self._expand(words, self._buffer[: len(words) << self._log2])
            self._run, start = range(block, block + len(words)), 0
        return self._buffer[start : start + n]

    @property
    def words(self) -> int:
        """32-bit words that are kept."""
        return self._packed.numel()

    def joined(self) -> Tensor:
        """The directions of all tensors one after another, fp32, new each time."""
        whole = torch.empty(len(self._packed) << self._log2, dtype=torch.float32, device=self.device)
        self._expand(self._packed, whole)
        if len(whole) == sum(numel for _, numel in self.tensors):
            return whole
        starts = [first << self._log2 for first in self._first]
        return torch.cat([whole[start : start + numel] for start, (_, numel) in zip(starts, self.tensors)])

    def get(self, i: int) -> Tensor:
        """The i-th tensor's direction, (numel,) fp32."""
        u = torch.zeros(self.tensors[i][1], dtype=torch.float32, device=self.device)
        self.add_(i, u, 1.0)
        return u
