"""Equal shares at random."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.contract import Examples, Partitioner
from hosfl_lightning.data.partition.shares import check_clients
from hosfl_lightning.data.partition.shuffles import Use, shuffled


class IID(Partitioner):
    """A random permutation cut into k runs: |S_j| = ⌈n/k⌉ for the first n mod k clients, ⌊n/k⌋ for the others.

    Example::

        data = DigitsData(num_clients=10, partitioner=IID())
    """

    @override
    def __call__(self, examples: Examples, seed: int) -> list[Tensor]:
        return partition_iid(len(examples), examples.num_clients, seed)


def partition_iid(n: int, k: int, seed: int) -> list[Tensor]:
    """Deal n examples to k clients at random, in shares that differ by at most one.

    Args:
        n: Number of examples.
        k: Number of clients.
        seed: The run's seed.

    Returns:
        k ascending index tensors (int64); their disjoint union is 0..n-1.

    Raises:
        ValueError: If k is not in 1..n.
    """
    check_clients(n, k)
    return [part.sort().values for part in torch.tensor_split(torch.tensor(shuffled(n, seed, Use.IID)), k)]
