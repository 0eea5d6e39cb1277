"""The user's own records and texts, from files of many kinds, folders and the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hosfl_lightning.data.checks import check_choice
from hosfl_lightning.data.csv_rows import csv_rows
from hosfl_lightning.data.decoding import check_encoding, read_text
from hosfl_lightning.data.json_rows import json_document, json_lines
from hosfl_lightning.data.rows import EmptyError, MissingError, OnMissing, Row, complete
from hosfl_lightning.data.sources import RECORDS, SAVED, TEXTS, Source, find_sources
from hosfl_lightning.data.tables import ClassNames, open_hub, read_saved, read_table

T = TypeVar("T")


class Records(NamedTuple):
    """What a source holds.

    Attributes:
        rows: The records, class labels by their names.
        class_names: By field, the names of its classes in order, where the source knows them.
    """

    rows: list[Row]
    class_names: ClassNames


class Texts(NamedTuple):
    """The documents of one file.

    Attributes:
        path: The file, the folder of a data set, or with a hub the split.
        documents: A text each.
    """

    path: str
    documents: list[str]


@dataclass(frozen=True)
class Reader:
    """How sources are read, the same for every data module.

    A source is a file, a folder, a glob or a list of them; with `hub`, the name of a split or a list of them. Records
    are in .jsonl, .ndjson, .json, .csv, .tsv, .parquet and .arrow, texts also in .txt, .text, .md, .rst and .py, each
    also with .gz and in any case; or in a folder of `save_to_disk`. A `.json` file is a list of objects, an object with
    one key and such a list, or JSON lines.

    Args:
        encoding: Of text, JSON and CSV files. With the default, UTF-16 and UTF-32 with a byte order mark are read too.
        delimiter: Between the cells of a CSV or TSV file. None: a comma, and in .tsv a tab.
        on_missing: What becomes of records without a value, and of files without a record or text: `error` refuses the
            first, `skip` leaves them out.
        hub: Name of a dataset for `datasets.load_dataset`.
        hub_config: Its configuration, if it has several.

    Raises:
        ValueError: A setting makes no sense.
    """

    encoding: str = "utf-8"
    delimiter: str | None = None
    on_missing: OnMissing = "error"
    hub: str | None = None
    hub_config: str | None = None

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        check_choice(("error", "skip"), on_missing=self.on_missing)
        if self.delimiter is not None and (len(self._delimiter("")) != 1 or self._delimiter("") in '"\r\n'):
            raise ValueError(f"delimiter={self.delimiter!r}: must be one character, such as ';' or a tab")
        if self.hub_config is not None and self.hub is None:
            raise ValueError(f"hub_config={self.hub_config!r}: it is of a dataset, set hub to its name")

    def rows(self, source: str | Sequence[str], setting: str, needs: Callable[[Row], Any]) -> Records:
        """All records of a source.

        Args:
            source: As above.
            setting: The argument that holds it, for messages.
            needs: Asks a record for what it must have (see `complete`).

        Raises:
            FileNotFoundError: If there is no such file, or none in a folder or for a glob.
            ImportError: If it needs the extra `hub`, and that is not installed.
            ValueError: If a file or a record is bad, or lacks what it must have; the message names file and line.
        """
        parts = self._each(self._find(source, setting, RECORDS), setting, lambda one: self._records(one, setting))
        rows = [row for part in parts for row in part.rows]
        return Records(complete(rows, needs, self.on_missing, setting), parts[0].class_names)

    def texts(self, source: str | Sequence[str], text_field: str, setting: str) -> list[Texts]:
        """The documents of each file: a text file is one, each record of another its field `text_field`.

        Raises:
            FileNotFoundError: As for `rows`.
            ImportError: As for `rows`.
            ValueError: As for `rows`.
        """

        def documents(one: Source) -> Texts:
            if one.kind in TEXTS:
                return Texts(one.path, [read_text(one.path, setting, self.encoding)])
            rows = self._records(one, setting).rows
            kept = complete(rows, lambda row: row.text(text_field, "text_field"), self.on_missing, one.name)
            return Texts(one.path, [row.fields[text_field] for row in kept])

        return self._each(self._find(source, setting, TEXTS + RECORDS), setting, documents)

    def _each(self, sources: Sequence[Source], setting: str, read: Callable[[Source], T]) -> list[T]:
        """What is read of each file; of those that are empty, or lack everything, what `on_missing` says."""
        found, empty = [], list[str]()
        for one in sources:
            try:
                found.append(read(one))
            except EmptyError as error:
                if self.on_missing == "error" and len(sources) > 1:
                    raise EmptyError(f"{error}; remove it, or leave such files out with on_missing: skip") from error
                empty.append(str(error))
            except MissingError as error:
                if self.on_missing == "error":
                    raise
                empty.append(str(error))
        if not found:
            files = f"{setting}: all {len(empty)} files are empty, the first: " if len(empty) > 1 else ""
            raise EmptyError(f"{files}{empty[0]}")
        if empty:
            rank_zero_info(f"{setting}: {len(empty)} of {len(sources)} files are skipped, the first: {empty[0]}")
        return found

    def _find(self, source: str | Sequence[str], setting: str, kinds: Sequence[str]) -> list[Source]:
        if self.hub is None:
            return find_sources(source, setting, kinds)
        splits = [source] if isinstance(source, str) else source
        return [Source(split, f"{setting} {split}", "") for split in splits]

    def _records(self, source: Source, setting: str) -> Records:
        rows: Any
        names: ClassNames = {}
        if self.hub is not None:
            rows, names = open_hub(self.hub, self.hub_config, source.path)
        elif source.kind == SAVED:
            rows, names = read_saved(source, setting)
        elif source.kind in (".parquet", ".arrow"):
            if not os.path.getsize(source.path):
                raise EmptyError(f"{setting}: {source.path!r} is empty")
            rows, names = read_table(source, setting)
        else:
            rows = self._parse(read_text(source.path, setting, self.encoding), source)
        records = Records([row._replace(file=source.path) for row in rows], names)
        if not records.rows:
            raise EmptyError(f"{setting}: {source.path!r} has no records")
        return records

    def _parse(self, text: str, source: Source) -> Any:
        if source.kind in (".csv", ".tsv"):
            return csv_rows(text, source.name, self._delimiter(source.kind))
        return (json_document if source.kind == ".json" else json_lines)(text, source.name)

    def _delimiter(self, kind: str) -> str:
        if self.delimiter is None:
            return "\t" if kind == ".tsv" else ","
        return "\t" if self.delimiter == "\\t" else self.delimiter  # as a shell or YAML's single quotes pass it
