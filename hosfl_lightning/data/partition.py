"""Which client holds which examples: IID, Dirichlet over the labels, or one client per value of a field.

Each function splits the indices 0..n-1 into disjoint sets whose union is everything: every example is in exactly one
client. Indices come back ascending; the order of use within a client is the data module's business.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from hosfl_lightning.rng import Domain, permutation

# The data-order stream without a client serves the splits; each use has a round of its own, so none repeats another.
_PARTITION_ROUND, _SUBSET_ROUND, _DIRICHLET_ROUND = 0, 1, 2


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
    _check_clients(n, k)
    order = permutation(n, seed, Domain.DATA_ORDER, round=_PARTITION_ROUND)
    return [_ascending(part) for part in torch.tensor_split(order, k)]


def partition_dirichlet(
    labels: Sequence[Hashable], k: int, alpha: float, seed: int, min_examples: int = 1
) -> list[Tensor]:
    """Skew the labels: of every class c, client j gets the share p_cj, with p_c ~ Dirichlet(alpha, ..., alpha).

    The examples of class c are shuffled (counter generator) and cut at round(n_c · cumsum(p_c)). The shares come from a
    local NumPy generator seeded by `seed`, so the same NumPy gives the same partition. Nothing is drawn again: a
    draw that leaves a client with fewer than `min_examples` examples is an error.

    Args:
        labels: The class of each example, any hashable values.
        k: Number of clients.
        alpha: Concentration, > 0. Below about 0.5 most clients see few classes; at 100 the partition is close to IID.
        seed: The run's seed.
        min_examples: The fewest examples that a client may end with.

    Returns:
        k ascending index tensors (int64); their disjoint union is 0..len(labels)-1.

    Raises:
        ValueError: If k is not in 1..len(labels), alpha is not positive, or a client gets too few examples.

    Reference: Yurochkin et al. 2019, arXiv 1905.12022, section 4; Li et al. 2021, arXiv 2102.02079.
    """
    _check_clients(len(labels), k)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha}: the Dirichlet concentration must be a positive number")
    order = permutation(len(labels), seed, Domain.DATA_ORDER, round=_DIRICHLET_ROUND).tolist()
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(k)]
    members_of: dict[Hashable, list[int]] = {}
    for index in order:
        members_of.setdefault(labels[index], []).append(index)
    for label in sorted(members_of, key=str):
        members = members_of[label]
        shares = generator.dirichlet(np.full(k, alpha))
        cuts = [0, *np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int).tolist(), len(members)]
        for part, start, stop in zip(parts, cuts, cuts[1:]):
            part.extend(members[start:stop])
    smallest = min(range(k), key=lambda j: len(parts[j]))
    if len(parts[smallest]) < min_examples:
        raise ValueError(
            f"alpha={alpha}, num_clients={k}: client {smallest} gets {len(parts[smallest])} of {len(labels)} examples, "
            f"fewer than {min_examples}; raise alpha, lower num_clients or take another seed"
        )
    return [_ascending(torch.tensor(part)) for part in parts]


def partition_by_field(values: Sequence[Hashable]) -> dict[str, Tensor]:
    """One client per distinct value (a writer, a device, a hospital), in the order of the values' text.

    Args:
        values: The field's value for each example; values with the same `str` are one client.

    Returns:
        Client name to ascending index tensor (int64); the disjoint union is 0..len(values)-1.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("partition by field: there are no examples")
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(str(value), []).append(index)
    return {name: _ascending(torch.tensor(groups[name])) for name in sorted(groups)}


def fixed_subset(n: int, size: int | None) -> list[int]:
    """At most `size` of n indices (None: all), ascending: a random choice, but the same for every seed of a run."""
    if size is None or size >= n:
        return list(range(n))
    return sorted(permutation(n, 0, Domain.DATA_ORDER, round=_SUBSET_ROUND)[:size].tolist())


def _ascending(indices: Tensor) -> Tensor:
    return indices.sort().values


def _check_clients(n: int, k: int) -> None:
    if k < 1:
        raise ValueError(f"num_clients={k}: there must be at least one client")
    if k > n:
        raise ValueError(f"num_clients={k} is more than the {n} examples: lower num_clients to {n} or fewer")
