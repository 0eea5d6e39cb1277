"""The short spelling of a partitioner in a recipe."""

from __future__ import annotations

from typing import Any

from hosfl_lightning.data.partition.by_field import ByField
from hosfl_lightning.data.partition.by_file import ByFile
from hosfl_lightning.data.partition.contract import Partitioner
from hosfl_lightning.data.partition.dirichlet import Dirichlet
from hosfl_lightning.data.partition.iid import IID

#: The settings beside the word, and their defaults in every data module.
DEFAULTS: dict[str, Any] = {"alpha": 0.5, "field": None, "min_examples_per_client": 1}


def spelled(partitioner: Partitioner | None, partition: str, **settings: Any) -> Partitioner:
    """The partitioner that is given, or the one that a word and its settings stand for.

    Args:
        partitioner: Given as an object; None: by the word.
        partition: `iid`, `dirichlet`, `field` or `by_file`.
        settings: Of `alpha`, `field` and `min_examples_per_client` those that the data module has.

    Raises:
        ValueError: If it is no partitioner, if both ways are used, or a setting is out of range.
    """
    if partitioner is None:
        known = DEFAULTS | settings
        if partition == "dirichlet":
            return Dirichlet(known["alpha"], known["min_examples_per_client"])
        return ByField(known["field"]) if partition == "field" else ByFile() if partition == "by_file" else IID()
    name = type(partitioner).__name__
    if not isinstance(partitioner, Partitioner):
        raise ValueError(f"partitioner: a {name} is no hosfl_lightning.data.Partitioner; make it a subclass")
    given = {"partition": partition} if partition != "iid" else {}
    given |= {key: value for key, value in settings.items() if value != DEFAULTS[key]}
    if given:
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        usual = ", ".join(f"{key}={'iid' if key == 'partition' else DEFAULTS[key]}" for key in given)
        raise ValueError(
            f"{shown}: is for a partition by word, and partitioner={name} is given; leave it out ({usual})"
        )
    return partitioner
