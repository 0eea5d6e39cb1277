"""Skewed labels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.contract import Examples, Partitioner
from hosfl_lightning.data.partition.shares import by_shares, check_clients, check_least
from hosfl_lightning.data.partition.shuffles import Use, shuffled

#: Beyond it NumPy's sum of k gamma variates overflows.
_LARGEST = 1e100


class Dirichlet(Partitioner):
    """Of every class c, client j gets the share p_cj, with p_c ~ Dirichlet(α, ..., α): few classes a client.

    Every client ends with at least `min_examples_per_client` examples: a draw that does not give them is drawn again,
    at most 100 times, and then single examples move from the largest clients; one line says how many. At 100 clients
    and α = 0.1 on 1,000 examples of ten classes a draw leaves six clients without any, in the mean.

    Args:
        alpha: α > 0. Below about 0.5 most clients see few classes; at 100 the partition is close to IID.
        min_examples_per_client: 0: a draw is taken as it comes, and a client that it leaves empty is never sampled.

    Reference: Hsu, Qi and Brown 2019, arXiv 1909.06335, which draws every client's classes; here, as Yurochkin et al.
    2019, arXiv 1905.12022, and Li et al. 2021, arXiv 2102.02079, every class's clients, so that all examples are used.

    Example::

        data = DigitsData(num_clients=100, partitioner=Dirichlet(alpha=0.1))
    """

    def __init__(self, alpha: float = 0.5, min_examples_per_client: int = 1) -> None:
        check_alpha(alpha)
        check_least(min_examples_per_client)
        self.alpha, self.min_examples_per_client = alpha, min_examples_per_client

    @override
    def __call__(self, examples: Examples, seed: int) -> list[Tensor]:
        least = self.min_examples_per_client
        return partition_dirichlet(examples.labels, examples.num_clients, self.alpha, seed, least)


def partition_dirichlet(
    labels: Sequence[Hashable], k: int, alpha: float, seed: int, min_examples: int = 1
) -> list[Tensor]:
    """Skew the labels: of every class c, client j gets the share p_cj, with p_c ~ Dirichlet(alpha, ..., alpha).

    The examples of class c are shuffled (counter generator) and cut at round(n_c · cumsum(p_c)). The shares come from a
    local NumPy generator seeded by `seed`, so the same NumPy gives the same partition. What is done for clients with
    fewer than `min_examples` examples, `by_shares` says.

    Args:
        labels: The class of each example, any hashable values.
        k: Number of clients.
        alpha: Concentration, > 0.
        seed: The run's seed.
        min_examples: The fewest examples of a client.

    Returns:
        k ascending index tensors (int64); their disjoint union is 0..len(labels)-1.

    Raises:
        ValueError: If there are fewer than k · min_examples examples, k is below 1 or alpha is not positive.
    """
    check_alpha(alpha)
    check_clients(len(labels), k, min_examples)
    order = shuffled(len(labels), seed, Use.DIRICHLET)
    generator = np.random.default_rng(seed)
    groups = by_label(labels, order)
    return by_shares(
        groups, lambda: [generator.dirichlet(np.full(k, alpha)) for _ in groups], order, min_examples, "Dirichlet"
    )


def by_label(labels: Sequence[Hashable], order: Sequence[int]) -> list[list[int]]:
    """The examples of each class as they come in `order`, the classes in the order of their text."""
    members_of: dict[Hashable, list[int]] = {}
    for index in order:
        members_of.setdefault(labels[index], []).append(index)
    return [members_of[label] for label in sorted(members_of, key=str)]


def check_alpha(alpha: float) -> None:
    """Refuse what is no concentration."""
    if not 0 < alpha <= _LARGEST:
        raise ValueError(f"alpha={alpha}: the Dirichlet concentration must be a positive number, {_LARGEST:g} at most")
