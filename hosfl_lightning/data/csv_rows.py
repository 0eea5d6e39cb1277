"""CSV and TSV files."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hosfl_lightning.data.rows import Row

#: The longest cell, where the module's own limit of 131,072 characters is too low for a document: a C long.
_LONGEST = min(sys.maxsize, 2**31 - 1)


def csv_rows(source: str, name: str, delimiter: str) -> list[Row]:
    """One record a line, or over several where a cell in quotes is; the first line names the fields.

    Raises:
        ValueError: A record has more or fewer cells than the header, or quotes that do not end. The message names the
            line where the record begins.
    """
    with _long_cells():
        reader = csv.reader(io.StringIO(source, newline=""), delimiter=delimiter, strict=True)
        records = _numbered(reader, name)
        _, header = next(records, ("", []))
        names = _checked([cell.strip() for cell in header], name)
        rows = []
        for where, cells in records:
            if len(cells) != len(names):
                raise ValueError(
                    f"{where}: the header names {len(names)} columns, this record has {len(cells)}; "
                    "set delimiter, or put cells that hold one into quotes"
                )
            rows.append(Row(where, dict(zip(names, cells))))
    return rows


def _numbered(reader: Iterator[list[str]], name: str) -> Iterator[tuple[str, list[str]]]:
    """The records that are no blank lines, with the line where each begins: `line_num` is the one where it ends."""
    while True:
        where = f"{name} line {reader.line_num + 1}"  # type: ignore[attr-defined]
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: not valid CSV ({error})") from error
        if cells:
            yield where, cells


def _checked(names: list[str], name: str) -> list[str]:
    twice = [one for one, count in Counter(names).items() if one and count > 1]  # spreadsheets leave empty columns
    if twice:
        raise ValueError(f"{name}: the header names the column {twice[0]!r} twice")
    other = [sign for sign in "\t;|" if len(names) == 1 and sign in names[0]]
    if other:
        raise ValueError(f"{name}: the header has one column, {names[0]!r}; set delimiter: {other[0]!r}")
    return names


@contextmanager
def _long_cells() -> Iterator[None]:
    """The module knows one limit for the whole process."""
    before = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)
