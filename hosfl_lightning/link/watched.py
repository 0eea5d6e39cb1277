"""A file that others may change while a run reads it."""

from __future__ import annotations

import os

#: Not the same as not there: who reads it is to learn of it.
_UNREADABLE = (-1, -1, -1)


class Watched:
    """Tells whether a file was written since it was last asked: by its time in ns, its size and its inode."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._state: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether it is another file than at the last call; before the first call it was not there.

        Ask first, read then: what is written in between is a change at the next call.
        """
        try:
            found = os.stat(self.path)
            state = found.st_mtime_ns, found.st_size, found.st_ino
        except FileNotFoundError:
            state = None
        except OSError:
            state = _UNREADABLE
        before, self._state = self._state, state
        return state != before
