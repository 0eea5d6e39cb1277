"""The short spelling of a partitioner in a recipe."""

from __future__ import annotations

from typing import Any

from hosfl_lightning.data.partition.by_field import ByField
from hosfl_lightning.data.partition.by_file import ByFile
from hosfl_lightning.data.partition.contract import Partitioner, say
from hosfl_lightning.data.partition.dirichlet import Dirichlet
from hosfl_lightning.data.partition.iid import IID

#: The settings beside the word, and their defaults in every data module.
DEFAULTS: dict[str, Any] = {"alpha": 0.5, "field": None, "min_examples_per_client": 1}
#: Which of them a word goes by.
USED: dict[str, tuple[str, ...]] = {
    "iid": (),
    "dirichlet": ("alpha", "min_examples_per_client"),
    "field": ("field",),
    "by_file": (),
}


def spelled(partitioner: Partitioner | None, partition: str, **settings: Any) -> Partitioner:
    """The partitioner that is given, or the one that a word and its settings stand for.

    An object wins over a word: what lies over a recipe can leave none of its keys out. One line says what is not used.

    Args:
        partitioner: Given as an object; None: by the word.
        partition: `iid`, `dirichlet`, `field` or `by_file`.
        settings: Of `alpha`, `field` and `min_examples_per_client` those that the data module has.

    Raises:
        ValueError: If it is no partitioner, or a setting is out of range.
    """
    name = type(partitioner).__name__
    if partitioner is not None and not isinstance(partitioner, Partitioner):
        raise ValueError(f"partitioner: a {name} is no hosfl_lightning.data.Partitioner; make it a subclass")
    used = USED[partition] if partitioner is None else ()
    unused = {key: value for key, value in settings.items() if key not in used and value != DEFAULTS[key]}
    if partitioner is not None and partition != "iid":
        unused = {"partition": partition} | unused
    if unused:
        shown = ", ".join(f"{key}={value}" for key, value in unused.items())
        say(f"Not used: {shown}, as {f'partition={partition}' if partitioner is None else f'partitioner={name}'}")
    if partitioner is not None:
        return partitioner
    known = DEFAULTS | settings
    if partition == "dirichlet":
        return Dirichlet(known["alpha"], known["min_examples_per_client"])
    return ByField(known["field"]) if partition == "field" else ByFile() if partition == "by_file" else IID()
