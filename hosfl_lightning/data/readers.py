"""Text, JSON-lines, CSV and hub datasets as rows that remember where they stand, for errors with a line number."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
_ROW_SUFFIXES = (".jsonl", ".csv")


class Row(NamedTuple):
    """One record of a dataset.

    Attributes:
        where: Its place, for messages: `train.jsonl line 7`.
        fields: Field name to value.
    """

    where: str
    fields: dict[str, Any]

    def field(self, name: str, setting: str) -> Any:
        """The value of a field that must be there; `setting` is the argument that named it."""
        if self.fields.get(name) is None:
            present = ", ".join(key for key, value in self.fields.items() if value is not None)
            raise ValueError(f"{self.where}: no field {name!r} ({setting}); the fields here are: {present}")
        return self.fields[name]

    def text(self, name: str, setting: str) -> str:
        """The value of a field that must be a non-empty string."""
        value = self.field(name, setting)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: {setting} {name!r} must be a non-empty string, not {value!r}")
        return value


def read_rows(path: str, setting: str) -> list[Row]:
    """Read a `.jsonl` or `.csv` file (`.gz` after either), UTF-8, one record a line.

    Args:
        path: The file. A CSV's first line names its fields.
        setting: The argument that holds the path, for messages.

    Returns:
        The records in file order; blank lines are skipped.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If the extension is unknown, the file is empty, not UTF-8 or broken gzip, or a line is malformed.
    """
    kind = _kind(path, setting, _ROW_SUFFIXES)
    source = _read(path, setting)
    rows = list(_json_rows(source, Path(path).name) if kind == ".jsonl" else _csv_rows(source, Path(path).name))
    if not rows:
        raise ValueError(f"{setting}: {path!r} has no records")
    return rows


def read_documents(path: str, text_field: str, setting: str) -> list[str]:
    """Read a language-modelling set: a plain text file is one document, each record of a `.jsonl`/`.csv` another.

    Args:
        path: A file ending in .txt, .text, .md, .rst, .py, .jsonl or .csv (`.gz` after any of them).
        text_field: The field that holds a record's text.
        setting: The argument that holds the path, for messages.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: As for `read_rows`, or when a record lacks the field.
    """
    if _kind(path, setting, _TEXT_SUFFIXES + _ROW_SUFFIXES) in _TEXT_SUFFIXES:
        return [_read(path, setting)]
    return [row.text(text_field, "text_field") for row in read_rows(path, setting)]


def read_hub(name: str, config: str | None, split: str) -> tuple[list[Row], dict[str, list[str]]]:
    """All records of one split of a Hugging Face dataset; arguments, results and errors are those of `open_hub`."""
    rows, names = open_hub(name, config, split)
    return list(rows), names


def open_hub(name: str, config: str | None, split: str) -> tuple[Iterator[Row], dict[str, list[str]]]:
    """Open one split of a Hugging Face dataset with `datasets.load_dataset(name, config, split=split)`.

    Args:
        name: Dataset name on the hub, or a local folder.
        config: Its configuration, if it has several.
        split: Name of the split.

    Returns:
        The records, one at a time, and the class names of the fields that are class labels.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If the dataset cannot be loaded or the split is empty.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"hub={name!r} needs the datasets library: pip install 'hosfl_lightning[hub]'", name="datasets"
        ) from error
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"hub={name!r}, hub_config={config!r}, split {split!r}: {' '.join(reason)}") from error
    if not len(dataset):
        raise ValueError(f"hub={name!r}: split {split!r} has no records")
    names = {key: list(kind.names) for key, kind in dataset.features.items() if hasattr(kind, "names")}
    return (Row(f"{name} {split} record {number}", dict(fields)) for number, fields in enumerate(dataset)), names


def read_bytes(path: str, setting: str) -> bytes:
    """The whole content of a file, unpacked if its name ends in .gz; `setting` is the argument that names it.

    Raises:
        FileNotFoundError: If the path is not a file.
        ValueError: If a .gz file is damaged or cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{setting}: there is no file {path!r}")
    content = Path(path).read_bytes()
    try:
        return gzip.decompress(content) if path.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{setting}: {path!r} is not a whole gzip file ({error})") from error


def _kind(path: str, setting: str, known: tuple[str, ...]) -> str:
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    if suffix not in known:
        raise ValueError(f"{setting}: unknown extension of {path!r}; known are {', '.join(known)}, each also with .gz")
    return suffix


def _read(path: str, setting: str) -> str:
    """The whole file as text, line ends as they are."""
    try:
        text = read_bytes(path, setting).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}: {path!r} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{setting}: {path!r} is empty")
    return text


def _json_rows(source: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(source, newline=None), start=1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a line must be a JSON object with named fields, not {line.strip()[:40]!r}")
        yield Row(where, fields)


def _csv_rows(source: str, name: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(source, newline=""), strict=True)
    try:
        for fields in reader:
            where = f"{name} line {reader.line_num}"
            if None in fields or None in fields.values():
                raise ValueError(f"{where}: the header names {len(reader.fieldnames or ())} columns, this line differs")
            yield Row(where, fields)
    except csv.Error as error:
        raise ValueError(f"{name} line {reader.line_num}: not valid CSV ({error})") from error
