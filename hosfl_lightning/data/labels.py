"""Class labels: integers or names, checked against the number of classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosfl_lightning.data.readers import Row


@dataclass(frozen=True)
class LabelSet:
    """The classes of a task.

    Attributes:
        count: Number of classes; valid indices are 0..count - 1.
        names: Their names, or None where labels are bare integers.
    """

    count: int
    names: Sequence[str] | None = None

    def index(self, row: Row, label_field: str) -> int:
        """The class index of a row: a name's position, or the integer itself (also spelled as text, as in a CSV).

        Raises:
            ValueError: If the field is missing, the integer is out of range or the name unknown, with the row's place.
        """
        value = row.field(label_field, "label_field")
        if self.names is not None and value in self.names:
            return list(self.names).index(value)
        number = _integer(value)
        if number is None:
            known = "there are no names, set labels" if self.names is None else f"the names are {_some(self.names)}"
            raise ValueError(f"{row.where}: label {value!r} is neither an integer nor a known name; {known}")
        if not 0 <= number < self.count:
            raise ValueError(
                f"{row.where}: label {number} is out of range, the {self.count} classes are 0..{self.count - 1}"
            )
        return number


def read_label_names(path: str) -> list[str]:
    """Read a JSON file with the list of class names, by index.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If it holds anything but a list of distinct strings.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"labels: there is no file {path!r}")
    try:
        names = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"labels: {path!r} is not valid JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"labels: {path!r} must hold a JSON list of distinct class names")
    return names


def infer_labels(rows: Sequence[Row], label_field: str) -> LabelSet:
    """The classes of a training set: 0..largest if every label is an integer >= 0, else its names in sorted order."""
    values = [row.field(label_field, "label_field") for row in rows]
    numbers = [_integer(value) for value in values]
    if all(number is not None for number in numbers):
        return LabelSet(max(number for number in numbers if number is not None) + 1)
    for row, value in zip(rows, values):
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: label {value!r} is not a name, as the other labels are")
    names = sorted(set(values))
    return LabelSet(len(names), names)


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
