"""A few labels a client, by shards."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.contract import Examples, Partitioner
from hosfl_lightning.data.partition.dirichlet import by_label
from hosfl_lightning.data.partition.shares import check_clients
from hosfl_lightning.data.partition.shuffles import Use, shuffled


class Shards(Partitioner):
    """The examples sorted by label are cut into s·k shards of equal size; client j gets shards π(sj), ..., π(sj+s-1).

    π is a random permutation of the shards, so a client sees about s classes; within a class the order is random. The
    sizes of shards differ by at most one.

    Args:
        shards_per_client: s.

    Raises:
        ValueError: When called with fewer examples than shards.

    Reference: McMahan et al. 2017, arXiv 1602.05629, section 3: MNIST, 200 shards of 300 images, two a client.

    Example::

        data = DigitsData(num_clients=50, partitioner=Shards(shards_per_client=2))
    """

    def __init__(self, shards_per_client: int = 2) -> None:
        if shards_per_client < 1:
            raise ValueError(f"shards_per_client={shards_per_client}: must be at least 1")
        self.shards_per_client = shards_per_client

    @override
    def __call__(self, examples: Examples, seed: int) -> list[Tensor]:
        n, k, s = len(examples), examples.num_clients, self.shards_per_client
        check_clients(n, k)
        if s * k > n:
            raise ValueError(
                f"shards_per_client={s}: {k} clients need {s * k} examples, one a shard, and there are {n}; lower it "
                f"to {n // k} or fewer, or lower num_clients"
            )
        classes = by_label(examples.labels, shuffled(n, seed, Use.SHARD_MEMBERS))
        shards = torch.tensor_split(torch.tensor([index for members in classes for index in members]), s * k)
        holders = shuffled(s * k, seed, Use.SHARD_HOLDERS)
        return [torch.cat([shards[i] for i in holders[s * j : s * (j + 1)]]).sort().values for j in range(k)]
