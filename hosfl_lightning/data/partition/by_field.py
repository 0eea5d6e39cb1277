"""The clients that the data has by nature."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.contract import Examples, Partitioner


class ByField(Partitioner):
    """S_v = {i : field(i) = v}: a client for each value of a field, such as a writer, a device or a hospital.

    The clients are in the order of the values' text, and have it as their names.

    Args:
        field: Name of the field.

    Reference: the natural partitions of Caldas et al. 2018, LEAF, arXiv 1812.01097.

    Example::

        data = ClassificationData(train="notes.csv", partitioner=ByField("hospital"))
    """

    def __init__(self, field: str) -> None:
        self.field = field

    @override
    def __call__(self, examples: Examples, seed: int) -> dict[str, Tensor]:
        return partition_by_field(examples.field(self.field))


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
    found = groups(values)
    return {name: found[name] for name in sorted(found)}


def groups(values: Sequence[Hashable]) -> dict[str, Tensor]:
    """The indices of each value by its text, in the order in which the values appear."""
    members: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        members.setdefault(str(value), []).append(index)
    return {name: torch.tensor(indices) for name, indices in members.items()}
