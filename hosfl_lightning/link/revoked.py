"""Certificates that no longer count: ``revoked.txt``."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from hosfl_lightning.link.errors import RevokedError
from hosfl_lightning.link.watched import Watched

# As hosfl writes them, and as openssl prints them.
_SERIAL = re.compile(r"(0[xX])?[0-9a-fA-F]+(:[0-9a-fA-F]+)*", re.ASCII)


def parse_serial(text: str) -> int | None:
    """A serial number from hexadecimal, with colons or without; None: it is none."""
    return int(text.replace(":", ""), 16) if _SERIAL.fullmatch(text) else None


def parse(data: bytes, path: str | os.PathLike[str]) -> frozenset[int]:
    """Serial numbers in hexadecimal, one a line; what follows a ``#`` is a remark.

    Raises:
        RevokedError: A line is something else.
    """
    found = set()
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        text = line.partition("#")[0].strip()
        serial = parse_serial(text)
        if serial is None and text:
            raise RevokedError(f"{path}, line {number}: {text[:80]!r} is no serial number in hexadecimal")
        if serial is not None:
            found.add(serial)
    return frozenset(found)


class Revoked:
    """``serial in Revoked(path)``: whether a certificate is revoked, by the file as it is now.

    A file that is not there revokes nothing. One that goes, is emptied or is damaged later, as while it is copied,
    changes nothing and is said in a warning.

    Attributes:
        serials: Of the revoked certificates.

    Raises:
        RevokedError: The file cannot be read at the start.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.serials: frozenset[int] = frozenset()
        self._file = Watched(self.path)
        if self._file.changed():
            self.serials = self._read()

    def __contains__(self, serial: int) -> bool:
        self.refresh()
        return serial in self.serials

    def refresh(self) -> bool:
        """Read the file if it was written since; whether other certificates are revoked now."""
        if not self._file.changed():
            return False
        before = self.serials
        try:
            self.serials = self._read()
        except RevokedError as error:
            warnings.warn(f"{error}; the {len(before)} that were revoked before stay so", stacklevel=2)
        return self.serials != before

    def _read(self) -> frozenset[int]:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise RevokedError(f"{self.path}: {error.strerror}") from error
        if self.serials and not data.strip():
            raise RevokedError(f"{self.path} is empty")
        return parse(data, self.path)
