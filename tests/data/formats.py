"""The same records in every kind of file that can hold them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict

Records = Sequence[dict[str, Any]]


def csv_text(records: Records, delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records: Records) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), buffer)
    return buffer.getvalue()


def arrow(records: Records, kind: Any = pyarrow.ipc.new_file) -> bytes:
    table, buffer = pyarrow.Table.from_pylist(list(records)), io.BytesIO()
    with kind(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


FORMATS = {
    ".jsonl": lambda records: "".join(f"{json.dumps(record)}\n" for record in records).encode(),
    ".ndjson": lambda records: "\n".join(json.dumps(record) for record in records).encode(),
    ".json": lambda records: json.dumps(list(records), indent=1).encode(),
    ".csv": csv_text,
    ".tsv": lambda records: csv_text(records, "\t"),
    ".parquet": parquet,
    ".arrow": arrow,
}


def write_records(folder: Path, name: str, records: Records) -> str:
    """A file by its extension, in any case and also with .gz; without one a folder of `save_to_disk`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = name.lower().removesuffix(".gz")
    suffix = Path(plain).suffix
    if not suffix:
        Dataset.from_list(list(records)).save_to_disk(path)
    else:
        data = FORMATS[suffix](records)
        path.write_bytes(gzip.compress(data) if plain != name.lower() else data)
    return str(path)


def save_splits(folder: Path, **splits: Dataset) -> str:
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)
