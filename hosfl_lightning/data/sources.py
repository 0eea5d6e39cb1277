"""Which files a setting means: a file, a folder, a glob, or a list of them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TEXTS = (".txt", ".text", ".md", ".rst", ".py")
RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
#: In place of an extension: a folder that `datasets` wrote with `save_to_disk`.
SAVED = "saved"


class Source(NamedTuple):
    """One file.

    Attributes:
        path: Where it is.
        name: What messages call it: its name, or its path where another file of the setting has that name.
        kind: Its extension in lower case, without .gz; or `SAVED`.
    """

    path: str
    name: str
    kind: str


def find_sources(source: str | Sequence[str], setting: str, kinds: Sequence[str]) -> list[Source]:
    """The files of a setting, in the order of the list; those of a folder (with all folders in it) or glob by path.

    Of folders and globs only files of the known kinds count, and none whose name begins with "." or "_".

    Args:
        source: A path, a glob such as "notes/**/*.txt", or a list of these. A folder may be one of `save_to_disk`.
        setting: The argument that holds it, for messages.
        kinds: Extensions that can be read.

    Raises:
        FileNotFoundError: There is no such file or folder, or no file of a known kind in it.
        ValueError: A file is of an unknown kind or named twice, or nothing is named.
    """
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not given:
        raise ValueError(f"{setting}: name at least one file, folder or glob")
    paths = [path for one in given for path in _paths(os.path.expanduser(os.fspath(one)), setting, kinds)]
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise ValueError(f"{setting}: {twice[0]!r} is named twice")
    names = Counter(Path(path).name for path in paths)
    return [Source(path, Path(path).name if names[Path(path).name] == 1 else path, kind_of(path)) for path in paths]


def kind_of(path: str) -> str:
    """The extension in lower case, without .gz; or `SAVED`."""
    if os.path.isdir(path):
        return SAVED if is_saved(path) else ""
    lower = path.lower()
    return Path(lower.removesuffix(".gz")).suffix


def is_saved(path: str) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    there = [Path(path, name).is_file() for name in ("dataset_dict.json", "state.json", "dataset_info.json")]
    return there[0] or all(there[1:])


def _paths(one: str, setting: str, kinds: Sequence[str]) -> list[str]:
    known = f"known are {', '.join(kinds)}, each also with .gz"
    if os.path.isfile(one):
        if kind_of(one) not in kinds:
            raise ValueError(f"{setting}: unknown extension of {one!r}; {known}")
        return [one]
    if os.path.isdir(one):
        found = list(_inside(one, kinds))
        if not found:
            raise FileNotFoundError(f"{setting}: the folder {one!r} holds no file to read; {known}")
        return found
    if not glob.has_magic(one):
        raise FileNotFoundError(f"{setting}: there is no file or folder {one!r}")
    matches = sorted(path for path in glob.glob(one, recursive=True) if not _hidden(path))
    found = [path for match in matches for path in (_inside(match, kinds) if os.path.isdir(match) else [match])]
    # "**" matches a folder and what is in it, also in one that is a data set.
    parts = [path for path in dict.fromkeys(found) if not is_saved(os.path.dirname(path))]
    found = [path for path in parts if kind_of(path) in (*kinds, SAVED)]
    if not found:
        raise FileNotFoundError(f"{setting}: no file to read matches {one!r}; {known}")
    return found


def _inside(folder: str, kinds: Sequence[str]) -> Iterator[str]:
    """The files in a folder and in those below it; a data set that is a folder is one."""
    if is_saved(folder):
        yield folder
        return
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if _hidden(path):
            continue
        if os.path.isdir(path):
            yield from _inside(path, kinds)
        elif kind_of(path) in kinds:
            yield path


def _hidden(path: str) -> bool:
    return os.path.basename(path).startswith((".", "_"))
