"""The random orders that partitions and subsets are made from."""

from __future__ import annotations

from enum import IntEnum

from hosfl_lightning.rng import Domain, permutation


class Use(IntEnum):
    """What an order is for: the round in the data-order stream without a client, so that no two uses share one."""

    IID = 0
    SUBSET = 1
    DIRICHLET = 2
    SHARD_MEMBERS = 3
    SHARD_HOLDERS = 4
    QUANTITY_SKEW = 5


def shuffled(n: int, seed: int, use: Use) -> list[int]:
    """0..n-1 in an order that is a function of the seed and the use."""
    return permutation(n, seed, Domain.DATA_ORDER, round=use).tolist()


def fixed_subset(n: int, size: int | None) -> list[int]:
    """At most `size` of n indices (None: all), ascending: a random choice, but the same for every seed of a run."""
    if size is None or size >= n:
        return list(range(n))
    return sorted(shuffled(n, 0, Use.SUBSET)[:size])
