"""Every durable write: files that are there whole or not at all, and bytes that stay once they are appended.

Nothing else in the package syncs, replaces or cuts a file, so a test can end the process at each of these calls: it
exchanges the ``os`` of this module.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_BUFFER = 1 << 20


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any], mode: int | None = None) -> None:
    """Temporary file beside ``path``, fsync, rename, fsync of the folder: a kill leaves the old file or the new.

    The temporary file always has the same name, so that the next write clears away what a kill left of it.

    Args:
        path: The file.
        write: Is given the temporary file.
        mode: Rights from the first byte on, such as 0o600 for a secret. None: those of the user's new files.
    """
    path = Path(path)
    os.makedirs(path.parent, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    if mode is not None and os.path.lexists(temporary):
        os.unlink(temporary)  # of a kill, or another's: it would keep its rights
    try:
        with io.BufferedWriter(_File(temporary, "wb" if mode is None else "xb", opener=_opener(mode)), _BUFFER) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = None) -> None:
    """`write_whole` of JSON, which has no word for NaN and infinity: null stands for them."""
    text = json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    write_whole(path, lambda file: file.write(text.encode() + b"\n"))


def plain(value: Any) -> Any:
    """With None for every float that is no finite number, in dicts and lists as well."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_folder(path: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """A folder that is there whole or not at all, and that only its owner can read: rights 0o700, its files 0o600.

    It is written beside its place and renamed. A kill leaves the temporary folder, which the next write clears away.

    Args:
        path: Not there yet, or an empty folder.
        contents: Of every file, by its name.

    Raises:
        OSError: There is something at ``path``; it is left as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    os.makedirs(path.parent, exist_ok=True)
    _clear(temporary)
    try:
        os.mkdir(temporary, 0o700)
        for name, data in contents.items():
            write_whole(temporary / name, _put(data), mode=0o600)
        os.replace(temporary, path)
    except BaseException:
        _clear(temporary)
        raise
    sync(path.parent)


def append(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` behind a file that exists, and fsync: on return it is durable, on an error the file is as before.

    A kill may leave any prefix of ``data``.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        size, rest = os.fstat(descriptor).st_size, memoryview(data)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except BaseException:
            os.truncate(path, size)
            raise
    finally:
        os.close(descriptor)


def truncate(path: str | os.PathLike[str], size: int) -> None:
    """Cut a file to its first ``size`` bytes, durably."""
    os.truncate(path, size)
    sync(path)


def discard(path: str | os.PathLike[str]) -> None:
    """Delete a file; one that is not there is no error."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def rename(path: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
    """Give a file a new name in its folder, durably."""
    os.replace(path, new)
    sync(Path(path).parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _File(io.FileIO):
    """Writes through this module's ``os``, as everything here does."""

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)


def _put(data: bytes) -> Callable[[BinaryIO], Any]:
    return lambda file: file.write(data)


def _opener(mode: int | None) -> Callable[[str, int], int]:
    return lambda path, flags: os.open(path, flags, 0o666 if mode is None else mode)


def _clear(folder: Path) -> None:
    """Delete a folder of files, if it is there."""
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            os.unlink(folder / name)
        os.rmdir(folder)
