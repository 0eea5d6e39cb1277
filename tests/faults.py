"""A process that is killed at a chosen write: deterministic, and inside the test's own process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hosfl_lightning import files

#: The calls after which the disk may look different, or for longer: where a kill is worth a test.
WRITES = ("write", "fsync", "replace", "truncate", "unlink")
#: What a dead process does not do either; a kill here leaves what a kill at the next write leaves.
OTHERS = ("makedirs", "mkdir", "open", "rmdir")


class Killed(BaseException):
    """The process ended here. No ``except Exception`` stops it, as none would stop a SIGKILL."""


class _Os:
    """``os`` as ``hosfl_lightning.files`` sees it: notes every write and dies at one of them."""

    def __init__(self, last: int | None = None, torn: bool = False) -> None:
        self.last, self.torn, self.dead = last, torn, False
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return partial(self._call, name, real) if name in WRITES + OTHERS else real

    def _call(self, name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dead:
            raise Killed(f"{name} of a process that is dead")
        if name in WRITES:
            if len(self.calls) == self.last:
                self.dead = True
                if self.torn and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Killed(f"at write point {self.last}, {name}")
            self.calls.append(name)
            if name == "fsync":
                return None  # takes long, and is for what outlives the machine: no process can tell
        return real(*args, **kwargs)


@contextmanager
def killed_at(n: int, torn: bool = False) -> Iterator[None]:
    """Kill the process at write point ``n``, counted from 0: the call and every later one raise ``Killed``.

    Cleanup code therefore changes nothing on disk. Resume *after* the ``with``, as another process would::

        with count_writes() as calls:
            run(folder)
        for n, name in enumerate(calls):
            with pytest.raises(Killed), killed_at(n, torn=name == "write"):
                run(another_folder)

    Args:
        n: Index into what ``count_writes`` lists for the uninterrupted run.
        torn: A write puts the first half of its bytes on disk before it dies; other calls do nothing.
    """
    with mock.patch.object(files, "os", _Os(n, torn)):
        yield


@contextmanager
def count_writes() -> Iterator[list[str]]:
    """The names of all write points of an uninterrupted run, in order."""
    watching = _Os()
    with mock.patch.object(files, "os", watching):
        yield watching.calls


def points(calls: list[str]) -> list[tuple[int, bool]]:
    """Every ``(n, torn)`` worth a kill: each point once, and each write once more, torn."""
    return [(n, False) for n in range(len(calls))] + [(n, True) for n, name in enumerate(calls) if name == "write"]


@contextmanager
def disk_states(folder: Path, into: Path) -> Iterator[list[Path]]:
    """Copies of ``folder`` as kills at all write points of what runs inside would leave it.

    Of states that differ in temporary files only, the last is kept, whose temporary file is the fullest.
    """
    camera = _Camera(folder, into)
    with mock.patch.object(files, "os", camera):
        yield camera.states
        camera.take()


class _Camera(_Os):
    """``os`` that notes what is on the disk before every write, in the middle of it, and at the end."""

    def __init__(self, folder: Path, into: Path) -> None:
        super().__init__()
        self.folder, self.into = folder, into
        self.states: list[Path] = []
        self._seen: dict[str, bytes] | None = None

    def _call(self, name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        if name in WRITES:
            self.take()
        if name == "write":
            descriptor, data = args
            half = real(descriptor, data[: len(data) // 2])
            self.take()
            args = descriptor, data[half:]
            return half + super()._call(name, real, *args)
        return super()._call(name, real, *args, **kwargs)

    def take(self) -> None:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        seen = {str(path): path.read_bytes() for path in found if ".part" not in str(path.relative_to(self.folder))}
        if seen != self._seen:
            self._seen = seen
            self.states.append(self.into / str(len(self.states)))
        elif self.states[-1].exists():
            shutil.rmtree(self.states[-1])
        if self.folder.exists():
            shutil.copytree(self.folder, self.states[-1])
