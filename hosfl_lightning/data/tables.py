"""Parquet and Arrow files, folders that `datasets` saved, and its hub: what pyarrow and `datasets` read."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from hosfl_lightning.data.decoding import read_bytes
from hosfl_lightning.data.rows import Row
from hosfl_lightning.data.sources import Source, is_saved

ClassNames = dict[str, list[str]]
#: The split that a setting means where its folder or data set holds several.
_SPLITS = {"files": "train", "validation_files": "validation", "test_files": "test"}


def read_table(source: Source, setting: str) -> tuple[list[Row], ClassNames]:
    """The records of a `.parquet` or `.arrow` file, also with .gz, and the names of its class labels.

    Raises:
        FileNotFoundError: If the path is not a file.
        ImportError: If pyarrow is not installed.
        ValueError: If the file is damaged.
    """
    arrow = _extra("pyarrow", f"{setting}={source.path!r}")
    content: Any = source.path
    if source.path.lower().endswith(".gz"):
        content = arrow.BufferReader(read_bytes(source.path, setting))
    try:
        table = _parquet(content) if source.kind == ".parquet" else _ipc(arrow, content)
        records = table.to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{setting}: {source.path!r} is not a whole {source.kind[1:]} file ({_line(error)})"
        ) from error
    names: ClassNames = {}
    if b"huggingface" in (table.schema.metadata or {}):
        datasets = _extra("datasets", f"{setting}={source.path!r}")
        names = _class_names(datasets.Features.from_arrow_schema(table.schema))
    return list(_rows(records, source.name, names)), names


def read_saved(source: Source, setting: str) -> tuple[list[Row], ClassNames]:
    """The records of a folder of `save_to_disk`; of one with several splits those of the split that is meant.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If it cannot be read, or has no such split.
    """
    opened, names = _open_saved(source.path, _SPLITS.get(setting, setting), f"{setting}={source.path!r}")
    return list(_rows(opened, source.name, names)), names


def open_hub(name: str, config: str | None, split: str) -> tuple[Iterator[Row], ClassNames]:
    """Open one split of a Hugging Face dataset with `datasets.load_dataset(name, config, split=split)`.

    Args:
        name: Dataset name on the hub, or a local folder, also one of `save_to_disk`.
        config: Its configuration, if it has several.
        split: Name of the split.

    Returns:
        The records, one at a time, class labels by their names; and these names, by field and in order.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If the dataset cannot be loaded or the split is empty.
    """
    if is_saved(name):
        opened, names = _open_saved(name, split, f"hub={name!r}")
    else:
        datasets = _extra("datasets", f"hub={name!r}")
        try:
            opened = datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError) as error:
            raise ValueError(f"hub={name!r}, hub_config={config!r}, split {split!r}: {_line(error)}") from error
        names = _class_names(opened.features)
    if not len(opened):
        raise ValueError(f"hub={name!r}: split {split!r} has no records")
    return _rows(opened, f"{name} {split}", names), names


def _open_saved(path: str, split: str, what: str) -> tuple[Any, ClassNames]:
    datasets = _extra("datasets", what)
    try:
        opened = datasets.load_from_disk(path)
    except Exception as error:  # whatever a damaged folder makes of the library
        raise ValueError(f"{what} is not a whole data set of save_to_disk ({_line(error)})") from error
    if isinstance(opened, dict):
        if split not in opened:
            raise ValueError(f"{what} has no split {split!r}; name the folder of one: {', '.join(map(str, opened))}")
        opened = opened[split]
    return opened, _class_names(opened.features)


def _parquet(content: Any) -> Any:
    # Not read_table: that takes folders named "a=b" above the file for columns.
    return importlib.import_module("pyarrow.parquet").ParquetFile(content).read()


def _ipc(arrow: Any, content: Any) -> Any:
    """A file in either of Arrow's formats: `datasets` writes streams, pandas files."""
    opened = arrow.memory_map(content) if isinstance(content, str) else content
    try:
        return arrow.ipc.open_file(opened).read_all()
    except arrow.ArrowInvalid:
        opened.seek(0)
        return arrow.ipc.open_stream(opened).read_all()


def _rows(records: Iterable[dict[str, Any]], name: str, names: ClassNames) -> Iterator[Row]:
    for number, record in enumerate(records):
        fields = dict(record)
        for field, known in names.items():
            if isinstance(fields.get(field), int):  # -1 is `datasets`' own way to say that there is none
                fields[field] = known[fields[field]] if 0 <= fields[field] < len(known) else None
        yield Row(f"{name} record {number}", fields)


def _class_names(features: dict[str, Any]) -> ClassNames:
    return {field: list(kind.names) for field, kind in features.items() if hasattr(kind, "names")}


def _extra(library: str, what: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the {library} library: pip install 'hosfl_lightning[hub]'", name=library
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).strip().splitlines()[:1]) or type(error).__name__
