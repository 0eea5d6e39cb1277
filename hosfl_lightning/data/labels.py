"""Class labels: integers or names, checked against the number of classes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hosfl_lightning.data.decoding import read_text
from hosfl_lightning.data.rows import Row

#: In the run folder and beside an exported adapter.
LABELS = "labels.json"
_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUTH = {"false": 0, "true": 1}


@dataclass(frozen=True)
class LabelSet:
    """The classes of a task.

    A label that reads as a whole number is that number, however a file writes it: 1, 1.0, "1" and "01" are one label.
    Where there are names it is first looked for among them. Where none of the names is a number, or there are no names,
    it is the index of the class. False and true are names, in every file and case; where there are no names, 0 and 1.

    Attributes:
        count: Number of classes; valid indices are 0..count - 1.
        names: Their names, or None where labels are bare integers.
    """

    count: int
    names: Sequence[str] | None = None

    def index(self, row: Row, label_field: str) -> int:
        """The class index of a row.

        Raises:
            ValueError: If the field is missing, the integer is out of range or the name unknown, with the row's place.
        """
        value = row.field(label_field, "label_field")
        text = label_text(value)
        if text in self._indices:
            return self._indices[text]
        if self.names is None and text in _TRUTH:
            text = str(_TRUTH[text])
        numbered = any(_WHOLE.fullmatch(name) for name in self._indices if name is not None)
        if text is None or numbered or not _WHOLE.fullmatch(text):
            known = "there are no names, set labels" if self.names is None else f"the names are {_some(self.names)}"
            what = "not a known name" if numbered else "neither an integer nor a known name"
            raise ValueError(f"{row.where}: label {value!r} is {what}; {known}")
        if not 0 <= int(text) < self.count:
            raise ValueError(
                f"{row.where}: label {text} is out of range, the {self.count} classes are 0..{self.count - 1}: "
                "counting starts at 0; a file for labels names classes that are counted otherwise"
            )
        return int(text)

    @cached_property
    def _indices(self) -> dict[str | None, int]:
        return {label_text(name): index for index, name in enumerate(self.names or ())}


def label_text(value: Any) -> str | None:
    """A label as a name that does not depend on the type in which a file holds it; None: it can be no label."""
    if not isinstance(value, bool | int | float | str):
        return None
    text = str(value).strip()
    if _WHOLE.fullmatch(text):
        return str(int(text.split(".")[0]))
    if _NUMBER.fullmatch(text):
        number = float(text)
        return str(int(number)) if number.is_integer() else str(number)
    return text.lower() if text.lower() in _TRUTH else text


def read_label_names(path: str) -> list[str]:
    """Read the class names by index: one a line, or in a JSON file a list, or a model's configuration with `id2label`.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If it holds anything but distinct names.
    """
    text = read_text(path, "labels")
    if Path(path).suffix.lower() != ".json":
        return _distinct([line.strip() for line in text.splitlines() if line.strip()], path)
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"labels: {path!r} is not valid JSON ({error})") from error
    if isinstance(names, dict) and isinstance(names.get("id2label"), dict):
        by_index = names["id2label"]
        names = [by_index.get(str(index)) for index in range(len(by_index))]
    return _distinct(names, path)


def write_label_names(names: Sequence[str]) -> bytes:
    """A JSON list, which `read_label_names` reads."""
    return (json.dumps(list(names), ensure_ascii=False, indent=1) + "\n").encode()


def infer_labels(rows: Sequence[Row], label_field: str) -> LabelSet:
    """The classes of a training set: 0..largest if every label is an integer, else its names in sorted order.

    Raises:
        ValueError: A label is neither, or a number that is no whole one; with its place.
    """
    texts = [label_text(row.field(label_field, "label_field")) for row in rows]
    numbered = any(text is not None and _WHOLE.fullmatch(text) for text in texts)
    for row, text in zip(rows, texts):
        value = row.fields[label_field]
        if text is None or (numbered and text in _TRUTH):
            raise ValueError(f"{row.where}: label {value!r} is neither an integer nor a name; write 0, 1, ... or names")
        if _NUMBER.fullmatch(text) and not _WHOLE.fullmatch(text):
            raise ValueError(
                f"{row.where}: label {value!r} is no whole number; write 0, 1, ... or names, or list the "
                "values in a file for labels"
            )
    known = sorted({text for text in texts if text is not None})
    if all(_WHOLE.fullmatch(text) for text in known):
        return LabelSet(max(map(int, known)) + 1)
    return LabelSet(len(known), known)


def check_from_zero(rows: Sequence[Row], label_field: str, count: int | None = None) -> None:
    """Refuse integers of which 0 is not the smallest: they may be names (one to five stars), or count from 1.

    Args:
        rows: The training set.
        label_field: Its field with the label.
        count: The number of classes, if it is known.

    Raises:
        ValueError: With the place of the first that has the smallest.
    """
    numbers = [int(text) for row in rows if (text := label_text(row.fields[label_field])) and _WHOLE.fullmatch(text)]
    if len(numbers) == len(rows) and min(numbers) != 0:
        where, smallest, largest = rows[numbers.index(min(numbers))].where, min(numbers), max(numbers)
        may_lack = smallest > 0 and (count is None or largest < count)
        index = f", or set num_labels: {count or largest + 1} if class 0 has no example" if may_lack else ""
        raise ValueError(
            f"{where}: label {smallest} is the smallest, but without names classes count from 0; list the names "
            f"in a file for labels{index}"
        )


def _distinct(names: Any, path: str) -> list[str]:
    texts = [label_text(name) for name in names] if isinstance(names, list) else [None]
    if None in texts or "" in texts or len(set(texts)) < len(texts) or not texts:
        raise ValueError(f"labels: {path!r} must hold distinct class names, in JSON as a list or as id2label")
    return [name.strip() if isinstance(name, str) else str(name) for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
