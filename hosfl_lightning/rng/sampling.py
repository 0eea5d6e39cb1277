"""Permutations from the counter-based generator: client sampling and data order."""

from __future__ import annotations

import torch
from torch import Tensor

from hosfl_client.rng.streams import BLOCK_BITS, Domain, Stream, check_range
from hosfl_lightning.rng.philox import words


def permutation(n: int, seed: int, domain: Domain, *, round: int = 0, client: int | None = None) -> Tensor:
    """A random permutation of 0..n-1 that is a function of its arguments alone.

    Entry i gets the 64-bit key

        key_i = w[2·(i & 1)] | w[2·(i & 1) + 1] << 32,    w = the four words of block i >> 1,

    of the stream (seed, domain, round, client, probe 0), tensor 0. The permutation lists the entries by increasing key
    (as unsigned numbers), equal keys by increasing index. Its first K entries are a uniform sample without replacement.

    Args:
        n: Number of entries.
        seed: The run's seed.
        domain: ``Domain.CLIENT_SAMPLING``, ``Domain.DATA_ORDER``, ``Domain.COORDINATES`` or ``Domain.SHIFT``.
        round: Round (or epoch) of the run.
        client: Client id, or ``None`` for what all clients share.

    Returns:
        (n,) int64 on the CPU.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_range("n", n, 1 << BLOCK_BITS)
    stream = Stream(seed, domain, round=round, client=client)
    halves = words(stream, 0, torch.arange((n + 1) // 2, device="cpu")).view(-1, 2)
    keys = halves[:n, 0] | halves[:n, 1] << 32
    # Flipping the top bit makes the order of signed integers that of unsigned ones.
    return torch.argsort(keys ^ -(1 << 63), stable=True)
