"""Directions of many tensors at once, in bounded scratch: at most 900 KiB, whatever their size.

No result depends on how tensors are cut into calls or chunks: an element is a function of the stream, the tensor's
index and the element's row-major index alone (see ``distributions``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from hosfl_client.bfloat16 import Array, Floats
from hosfl_client.rng.distributions import LOG2_BLOCK, check_distribution, expand, round_coefficient
from hosfl_client.rng.philox import BLOCKS, U64, Generator, Words
from hosfl_client.rng.streams import BLOCK_BITS, TENSOR_BITS, Stream, check_range

ELEMENTS = 1 << 15
"""Expanded at once: 128 KiB."""

Piece = tuple[int, int, int]
"""A run of elements of one tensor: ``(tensor, start, stop)``."""


class Runs:
    """Pieces of tensors as one row of blocks: small tensors share a call of the generator, large ones take several.

    Args:
        pieces: Whole tensors, or parts of them that begin anywhere.
        log2: Binary logarithm of the elements of a block.
        c1: Of each piece's tensor.

    Attributes:
        total: Number of blocks, where two pieces never share one.
    """

    def __init__(self, pieces: Sequence[Piece], log2: int, c1: Sequence[int]) -> None:
        self.pieces, self.log2, self.c1 = pieces, log2, c1
        counts = [max((stop - 1 >> log2) + 1 - (start >> log2), 0) for _, start, stop in pieces]
        self.ends = [0, *accumulate(counts)]
        self.total = self.ends[-1]

    def counters(self, begin: int, end: int) -> tuple[U64, U64]:
        """Block indices and counter word 1 of a part of the row."""
        blocks, c1 = np.empty((2, end - begin), np.uint64)
        for i, low, high in self._within(begin, end):
            first = (self.pieces[i][1] >> self.log2) + low - self.ends[i]
            blocks[low - begin : high - begin] = np.arange(first, first + high - low, dtype=np.uint64)
            c1[low - begin : high - begin] = self.c1[i]
        return blocks, c1

    def split(self, begin: int, end: int, elements: Array) -> Iterator[tuple[int, int, Array]]:
        """The elements of a part of the row, piece by piece: (number of the piece, position in it, its elements)."""
        for i, low, high in self._within(begin, end):
            _, start, stop = self.pieces[i]
            first = (start >> self.log2) + low - self.ends[i] << self.log2
            behind = low - begin << self.log2
            skipped = max(start - first, 0)
            last = min(stop - first, high - low << self.log2)
            yield i, first + skipped - start, elements[behind + skipped : behind + last]

    def _within(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        i = int(np.searchsorted(self.ends, begin, side="right")) - 1
        while i < len(self.pieces) and self.ends[i] < end:
            low, high = max(begin, self.ends[i]), min(end, self.ends[i + 1])
            if low < high:
                yield i, low, high
            i += 1


def sums(
    streams: Sequence[Stream], alphas: Sequence[float], pieces: Sequence[Piece]
) -> Iterator[tuple[int, int, Floats]]:
    """``Σ_p α_p u_p``, in fp32 in the order of the streams, some thousand elements at a time.

    Args:
        streams: Of one seed, domain and round.
        alphas: One for each stream, rounded by :func:`round_coefficient`.
        pieces: Of which tensors.

    Yields:
        (number of the piece, position in it, elements); they are valid until the next, and may be overwritten.

    Raises:
        ValueError: A tensor or an element is out of range, or the streams' domain has no directions.
    """
    domain = streams[0].domain
    total, part = np.empty((2, ELEMENTS), np.float32)
    for runs, begin, end, drawn in drawn_words(streams, pieces):
        n = end - begin << runs.log2
        for first, words in drawn:
            for probe, own in enumerate(words, first):
                u = expand(own, domain, alphas[probe], part[:n] if probe else total[:n])
                if probe:
                    np.add(total[:n], u, out=total[:n])
        yield from runs.split(begin, end, total[:n])


Drawn = Iterator[tuple[int, Words]]


def drawn_words(streams: Sequence[Stream], pieces: Sequence[Piece]) -> Iterator[tuple[Runs, int, int, Drawn]]:
    """All words of the pieces, in parts of at most `ELEMENTS` elements: (the row, a part's bounds, its words).

    The words of a part come as (number of the first stream, (m, n, 4) words) for m streams at a time.
    """
    domain = streams[0].domain
    check_distribution(domain)
    log2 = LOG2_BLOCK[domain]
    for tensor, start, stop in pieces:
        check_range("tensor", tensor, 1 << TENSOR_BITS)
        check_range("start", start, stop + 1)
        check_range("stop", stop, (1 << BLOCK_BITS + log2) + 1)
    runs = Runs(pieces, log2, [streams[0].c1(tensor) for tensor, _, _ in pieces])
    part = ELEMENTS >> log2
    # As many parts as one call of the generator holds of all streams; of one part as many streams.
    parts = max(1, BLOCKS // (part * len(streams)))
    together = BLOCKS // (part * parts)
    generator = Generator(min(BLOCKS, runs.total * len(streams)))
    for begin in range(0, runs.total, part * parts):
        end = min(begin + part * parts, runs.total)
        blocks, c1 = runs.counters(begin, end)
        if together >= len(streams):
            words = generator(streams, blocks, c1)
            for low in range(begin, end, part):
                high = min(low + part, end)
                yield runs, low, high, iter([(0, words[:, low - begin : high - begin])])
        else:
            yield runs, begin, end, (
                (first, generator(streams[first : first + together], blocks, c1))
                for first in range(0, len(streams), together)
            )  # fmt: skip


def add_direction(out: Floats, alpha: float, stream: Stream, tensor: int, start: int = 0) -> None:
    """In place, out_i <- out_i + α·u_{start + i}.

    Args:
        out: (n,) float32 whose element 0 is the logical element ``start``.
        alpha: A number that is rounded here by :func:`round_coefficient`.
        stream: Which direction; its domain is the distribution.
        tensor: Index in the manifest of trainable tensors, 16 bits.
        start: Row-major index of ``out[0]`` in the full tensor; any, block boundary or not.

    Raises:
        ValueError: A value is out of range, or the stream's domain has no directions.
    """
    alpha = round_coefficient(alpha, stream.domain)
    for _, position, u in sums([stream], [alpha], [(tensor, start, start + len(out))]):
        out[position : position + len(u)] += u


def direction(stream: Stream, tensor: int, start: int, stop: int) -> Floats:
    """Elements u_start, ..., u_{stop-1} of one tensor's direction, (stop - start,) float32."""
    check_range("start", start, stop + 1)
    u = np.zeros(stop - start, np.float32)
    add_direction(u, 1.0, stream, tensor, start)
    return u
