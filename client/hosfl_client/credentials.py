"""What this client shows a server: its certificate, which TLS and the server check; here, that the files are right."""

from __future__ import annotations

import base64
import binascii
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s+(.*?)\s*-----END \1-----", re.DOTALL)
#: The object identifier of a common name, 2.5.4.3, as DER writes it.
_COMMON_NAME = bytes([0x06, 3, 0x55, 4, 3])
_SEQUENCE, _SET, _VERSION = 0x30, 0x31, 0xA0
_STRINGS = {0x0C: "utf-8", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", 0x1E: "utf-16-be"}


class CredentialsError(ValueError):
    """The folder of a site does not hold what a connection needs."""


@dataclass(frozen=True)
class Site:
    """A certificate, its key and the CA whose servers it trusts, all PEM.

    Attributes:
        name: The certificate's common name.
    """

    name: str
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    authority: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Site:
        """Read ``ca.crt``, ``site.crt`` and ``site.key``, as ``hosfl certs client`` made them.

        Raises:
            CredentialsError: A file is missing, no PEM, or the key has a password.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CredentialsError(f"--certs: {folder} is no folder; give the one that hosfl certs client made")
        authority, certificate = (_pem(folder / name, b"CERTIFICATE") for name in ("ca.crt", "site.crt"))
        key = _pem(folder / "site.key", b"PRIVATE KEY")
        if b"ENCRYPTED" in key:
            raise CredentialsError(
                f"--certs: {folder / 'site.key'} has a password, which is not asked for; write it without: openssl "
                "pkey -in site.key -out NEW"
            )
        if os.name == "posix" and (folder / "site.key").stat().st_mode & 0o077:
            warnings.warn(f"{folder / 'site.key'} can be read by others than its owner: chmod 600 it", stacklevel=2)
        return cls(common_name(certificate, folder / "site.crt"), certificate, key, authority)

    def channel_credentials(self) -> Any:
        """gRPC's: this site to a server whose certificate is of the CA, and of no other CA."""
        import grpc

        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def common_name(pem: bytes, path: Path) -> str:
    """The one common name of the first certificate's subject; the server compares what a client says with it.

    Raises:
        CredentialsError: It is no certificate, or has none or several.
    """
    block = _BLOCK.search(pem)
    try:
        assert block is not None
        der = base64.b64decode(b"".join(block[2].split()), validate=True)
        found = list(_names(der))
    except (AssertionError, binascii.Error, IndexError, ValueError) as error:
        raise CredentialsError(f"--certs: {path} is no certificate in PEM ({error}); copy it again") from error
    if len(found) != 1:
        raise CredentialsError(f"--certs: {path} has {len(found)} common names; exactly one says whose it is")
    return found[0]


def _names(der: bytes) -> Iterator[str]:
    """The common names of the subject, the sixth part of what is signed where a version stands first."""
    [(_, certificate)] = _parts(der)
    (_, signed), *_ = _parts(certificate)
    fields = [part for part in _parts(signed) if part[0] != _VERSION]  # number, algorithm, issuer, dates, subject, ...
    kind, subject = fields[4]
    if kind != _SEQUENCE:
        raise ValueError("its subject is no list of names")
    for _, names in (part for part in _parts(subject) if part[0] == _SET):
        for _, pair in _parts(names):
            if pair.startswith(_COMMON_NAME):
                kind, value = list(_parts(pair))[1]
                yield value.decode(_STRINGS[kind]) if kind in _STRINGS else ""


def _parts(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element, one after the other."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length >= 0x80:
            count = length & 0x7F
            if not 1 <= count <= 4:
                raise ValueError("a length that DER does not write")
            length, at = int.from_bytes(der[at : at + count], "big"), at + count
        if at + length > len(der):
            raise ValueError("it ends before it should")
        yield tag, der[at : at + length]
        at += length


def _pem(path: Path, kind: bytes) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CredentialsError(
            f"--certs: {path} is missing; take all of the folder that hosfl certs client made"
        ) from error
    except OSError as error:
        raise CredentialsError(f"--certs: {path}: {error.strerror}") from error
    if not any(match[1].endswith(kind) for match in _BLOCK.finditer(data)):
        raise CredentialsError(f"--certs: {path} has no {kind.decode()} in PEM; copy it again")
    return data
