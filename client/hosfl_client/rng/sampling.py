"""Permutations from the counter-based generator: the order of a client's data, and subsets of coordinates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hosfl_client.rng.philox import BLOCKS, Generator
from hosfl_client.rng.streams import BLOCK_BITS, Domain, Stream, check_range


def permutation(
    n: int, seed: int, domain: Domain, *, round: int = 0, client: int | None = None
) -> npt.NDArray[np.int64]:
    """A random permutation of 0..n-1 that is a function of its arguments alone.

    Entry i gets the 64-bit key

        key_i = w[2·(i & 1)] | w[2·(i & 1) + 1] << 32,    w = the four words of block i >> 1,

    of the stream (seed, domain, round, client, probe 0), tensor 0. The permutation lists the entries by increasing key
    (as unsigned numbers), equal keys by increasing index.

    Args:
        n: Number of entries.
        seed: The run's seed.
        domain: ``Domain.CLIENT_SAMPLING``, ``Domain.DATA_ORDER``, ``Domain.COORDINATES`` or ``Domain.SHIFT``.
        round: Round (or epoch) of the run.
        client: Client id, or ``None`` for what all clients share.

    Returns:
        (n,) int64.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_range("n", n, 1 << BLOCK_BITS)
    stream = Stream(seed, domain, round=round, client=client)
    generator, keys = Generator(), np.empty(n, np.uint64)
    for begin in range(0, n, 2 * BLOCKS):
        part = keys[begin : begin + 2 * BLOCKS]
        blocks = np.arange(begin >> 1, (begin + len(part) + 1) >> 1, dtype=np.uint64)
        part[:] = generator([stream], blocks, stream.c1(0)).reshape(-1).view("<u8")[: len(part)]
    return np.argsort(keys, kind="stable")
