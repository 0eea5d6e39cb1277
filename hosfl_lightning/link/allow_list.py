"""Who may join: ``clients.yaml``, the common name of every client's certificate.

::

    0: hospital-a
    1: hospital-b
    2:             # nobody: shut out, the number stays
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hosfl_lightning.link.errors import AllowListError
from hosfl_lightning.link.names import RULE, is_name
from hosfl_lightning.link.watched import Watched


class AllowList:
    """Numbers of clients and their names, by the file as it was at the last :meth:`refresh`.

    Attributes:
        total: How many clients the run has, those that are shut out among them: the highest number + 1 at the start.
        names: By number, of those that may join.

    Raises:
        AllowListError: The file is not there or is no such list.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: Watched | None = Watched(path)
        self._file.changed()
        self._take(_read(Path(path)))

    @classmethod
    def of(cls, names: Mapping[int, str | None]) -> AllowList:
        """A list that never changes.

        Raises:
            AllowListError: It is no such list.
        """
        allowed = cls.__new__(cls)
        allowed._file = None
        allowed._take(_check(((number, name, "") for number, name in names.items()), "the allow list"))
        return allowed

    def number_of(self, name: str) -> int | None:
        """Of the client with this name; None: it may not join."""
        return self._numbers.get(name)

    def refresh(self) -> bool:
        """Read the file if it was written since; whether others may join now.

        A list that is none, or has more clients than the run, changes nothing and is said in a warning.
        """
        if self._file is None or not self._file.changed():
            return False
        before = self.names
        try:
            entries = _read(Path(self._file.path))
            if max(entries) >= self.total:
                raise AllowListError(
                    f"{self._file.path}: client {max(entries)}, but the run has {self.total} clients, 0 to "
                    f"{self.total - 1}; more of them need a new run"
                )
            self._set(entries)
        except AllowListError as error:
            warnings.warn(f"{error}; the list stays as it was", stacklevel=2)
        return self.names != before

    def _take(self, entries: dict[int, str | None]) -> None:
        self.total = max(entries) + 1
        self._set(entries)

    def _set(self, entries: dict[int, str | None]) -> None:
        self.names = {number: name for number, name in sorted(entries.items()) if name is not None}
        self._numbers = {name: number for number, name in self.names.items()}


def _read(path: Path) -> dict[int, str | None]:
    try:
        loader = yaml.SafeLoader(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AllowListError(f"{path}: {_line(error)}") from error
    try:
        # Key by key: a dict would keep the last of two entries with one number.
        root: Any = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise AllowListError(
                f"{path}: no list of clients; give a line NUMBER: NAME for each, such as 0: hospital-a"
            )
        entries = [
            (*(_scalar(loader, node, path) for node in pair), f", line {pair[0].start_mark.line + 1}")
            for pair in root.value
        ]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, AllowListError):
            raise
        raise AllowListError(f"{path}: {_line(error)}") from error
    finally:
        loader.dispose()
    return _check(entries, str(path))


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise AllowListError(f"{path}, line {node.start_mark.line + 1}: NUMBER: NAME has no lists or mappings in it")
    return loader.construct_object(node)


def _check(entries: Iterable[tuple[Any, Any, str]], source: str) -> dict[int, str | None]:
    """The entries, each with the line that it stands in.

    Raises:
        AllowListError: A number or a name is none, or is there twice, or there is no entry.
    """
    found: dict[int, str | None] = {}
    for number, name, line in entries:
        where = f"{source}{line}"
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise AllowListError(f"{where}: {number!r} is no number of a client; give an integer >= 0")
        if number in found:
            raise AllowListError(f"{where}: client {number} is there twice; give it one name")
        if name is not None and not is_name(name):
            hint = "" if isinstance(name, str) else f"; if it is meant, put it in quotes: '{name}'"
            raise AllowListError(f"{where}: client {number}: {name!r} is not the name of a site: {RULE}{hint}")
        if name is not None and name in found.values():
            raise AllowListError(f"{where}: client {number}: {name} is another client already; a name has one number")
        found[number] = name
    if not found:
        raise AllowListError(f"{source}: no clients; give a line NUMBER: NAME for each, such as 0: hospital-a")
    return found
