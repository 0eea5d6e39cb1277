"""Random directions of one tensor, whole, in part or by rows, in bounded scratch.

No result depends on how a tensor is cut into calls, chunks, shards or threads: an element is a function of the stream,
the tensor's index and the element's row-major index alone (see ``distributions``).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from hosfl_client.rng.distributions import LOG2_BLOCK, check_distribution
from hosfl_client.rng.streams import BLOCK_BITS, MASK32, TENSOR_BITS, Domain, Stream, check_range
from hosfl_lightning.rng.distributions import LOG2_WORD, Expander, round_coefficient
from hosfl_lightning.rng.philox import WordGenerator, check_indices

CHUNK_BLOCKS = 16384
"""Blocks generated at once: 72 bytes of scratch each."""

SLICE_BLOCKS = {Domain.RADEMACHER: 4096, Domain.GAUSS16: 16384}
"""Blocks expanded at once: 512 bytes of scratch each for Rademacher, 64 for gauss16."""


def addend(out: Tensor) -> Tensor:
    """The memory of ``out`` without its autograd history, to be added to in place.

    Raises:
        TypeError: ``out`` is not a contiguous 1-D fp32 tensor.
    """
    if out.dtype != torch.float32 or out.dim() != 1 or not out.is_contiguous():
        raise TypeError(f"out must be a contiguous 1-D fp32 tensor, got shape {tuple(out.shape)}, {out.dtype}")
    return out.detach()


def add_scaled_(out: Tensor, u: Tensor, alpha: float | Tensor) -> None:
    """Out <- out + α·u for a rounded α; both forms give the same bits because the product is exact."""
    if isinstance(alpha, Tensor):
        out.addcmul_(u, alpha)
    else:
        out.add_(u, alpha=alpha)


def add_direction_(out: Tensor, alpha: float | Tensor, stream: Stream, tensor: int, start: int = 0) -> None:
    """In place, unseen by autograd, out_i <- out_i + α·u_{start + i}, with at most 4 MiB of scratch whatever the size.

    Args:
        out: (n,) contiguous fp32 view whose element 0 is the logical element ``start``.
        alpha: A float, rounded here by :func:`round_coefficient`; or a 0-d fp32 tensor on ``out``'s device that has
            been rounded already (the host does not wait for it).
        stream: Which direction; its domain is the distribution.
        tensor: Index in the manifest of trainable tensors, 16 bits.
        start: Row-major index of ``out[0]`` in the full tensor; any, block boundary or not.

    Raises:
        ValueError: ``tensor`` or an element is out of range, α is not finite, or the stream's domain has no directions.
        TypeError: ``out`` is not a contiguous 1-D fp32 tensor.
    """
    out = addend(out)
    check_distribution(stream.domain)
    check_range("tensor", tensor, 1 << TENSOR_BITS)
    log2, n = LOG2_BLOCK[stream.domain], out.numel()
    check_range("start", start, (1 << BLOCK_BITS + log2) - n + 1)
    if n == 0:
        return
    if not isinstance(alpha, Tensor):
        alpha = round_coefficient(alpha, stream.domain)
    for block, u in _expanded_slices(stream, tensor, start >> log2, (start + n - 1 >> log2) + 1, out.device):
        position = (block << log2) - start
        u = u[max(-position, 0) : n - position]
        position = max(position, 0)
        add_scaled_(out[position : position + len(u)], u, alpha)


def _expanded_slices(
    stream: Stream, tensor: int, first: int, stop: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first block, elements) of successive runs of blocks; the elements are valid until the next run."""
    log2 = LOG2_BLOCK[stream.domain]
    chunk, size = (min(stop - first, blocks) for blocks in (CHUNK_BLOCKS, SLICE_BLOCKS[stream.domain]))
    generator, expand = WordGenerator(stream, chunk, device), Expander(stream.domain, device)
    buffer = torch.empty(size << log2, dtype=torch.float32, device=device)
    # Chunks end at multiples of CHUNK_BLOCKS, so that the upper bits of the block are the same for a whole chunk.
    for chunk_stop in range(first // CHUNK_BLOCKS * CHUNK_BLOCKS + CHUNK_BLOCKS, stop + CHUNK_BLOCKS, CHUNK_BLOCKS):
        begin, end = max(first, chunk_stop - CHUNK_BLOCKS), min(stop, chunk_stop)
        c0 = torch.arange(begin & MASK32, (begin & MASK32) + end - begin, device=device)
        packed = generator(c0, stream.c1(tensor, begin))
        for i in range(0, end - begin, size):
            part = packed[i : i + size]
            yield begin + i, expand(part, buffer[: len(part) << log2])


def direction(
    stream: Stream, tensor: int, start: int, stop: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Elements u_start, ..., u_{stop-1} of one tensor's direction.

    Args:
        stream: Which direction; its domain is the distribution.
        tensor: Index in the manifest of trainable tensors, 16 bits.
        start: First element.
        stop: One past the last element.
        device: Where; the CPU if ``None``.

    Returns:
        (stop - start,) fp32.

    Raises:
        ValueError: A value is out of range, or the stream's domain has no directions.
    """
    check_range("start", start, stop + 1)
    u = torch.zeros(stop - start, dtype=torch.float32, device="cpu" if device is None else device)
    add_direction_(u, 1.0, stream, tensor, start)
    return u


def direction_rows(stream: Stream, tensor: int, rows: Tensor, width: int) -> Tensor:
    """Rows of the direction viewed as (-1, width): what an embedding needs, at the cost of the looked-up rows.

    Args:
        stream: Which direction; its domain is the distribution.
        tensor: Index in the manifest of trainable tensors, 16 bits.
        rows: (n,) int64 row indices, in any order, with repeats.
        width: Length of a row.

    Returns:
        (n, width) fp32 on the device of ``rows``.

    Raises:
        ValueError: ``tensor``, ``width`` or a row is out of range, or the stream's domain has no directions.
        TypeError: ``rows`` is not 1-D int64.
    """
    check_distribution(stream.domain)
    check_range("tensor", tensor, 1 << TENSOR_BITS)
    log2, device = LOG2_BLOCK[stream.domain], rows.device
    check_range("width - 1", width - 1, 1 << BLOCK_BITS + log2)
    check_indices("rows", rows, (1 << BLOCK_BITS + log2) // width)
    spanned = torch.arange(_spanned(width, 1 << log2), device=device)
    step = min(len(rows), max(1, SLICE_BLOCKS[stream.domain] // len(spanned)))
    generator, expand = WordGenerator(stream, step * len(spanned), device), Expander(stream.domain, device)
    u = torch.empty(len(rows), width, dtype=torch.float32, device=device)
    for i in range(0, len(rows), max(step, 1)):
        first = rows[i : i + step, None] * width
        blocks = ((first >> log2) + spanned).flatten()
        packed = generator(blocks & MASK32, blocks >> 32 << 24 | stream.c1(tensor)).view(len(first), -1)
        _expand_rows_(u[i : i + step], packed, first & (1 << log2) - 1, expand)
    return u


def _spanned(width: int, unit: int) -> int:
    """Most units of ``unit`` elements that a row of ``width`` elements, starting at a multiple of it, reaches into."""
    return -(-(unit - gcd(width, unit) + width) // unit)


def _expand_rows_(out: Tensor, packed: Tensor, offset: Tensor, expand: Expander) -> None:
    """Fill the rows of ``out`` from element ``offset`` (n, 1) on of each row of words, touching only words in use."""
    log2, width = LOG2_WORD[expand.domain], out.shape[1]
    words = _spanned(width, 1 << log2)
    if words < packed.shape[1]:
        packed = packed.gather(1, (offset >> log2) + torch.arange(words, device=out.device))
    if words << log2 == width:
        expand(packed, out.view(-1))
        return
    elements = out.new_empty(packed.numel() << log2)
    columns = (offset & (1 << log2) - 1) + torch.arange(width, device=out.device)
    torch.gather(expand(packed, elements).view(len(out), -1), 1, columns, out=out)
