"""A CA in its folder: what it issued, and what it revoked.

``ca.crt`` and ``ca.key``; ``issued/SERIAL.crt``, every certificate that it signed; ``revoked.txt``, for the server.
Serial numbers are in hexadecimal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hosfl_lightning.files import write_folder, write_whole
from hosfl_lightning.link.certificates import Pair, common_name, make_authority, make_client, make_server
from hosfl_lightning.link.errors import CertificateError
from hosfl_lightning.link.extra import remote_extra
from hosfl_lightning.link.revoked import parse

with remote_extra():
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

CERTIFICATE, KEY, REVOKED, ISSUED = "ca.crt", "ca.key", "revoked.txt", "issued"
_HEAD = (
    b"# Revoked certificates: a serial number a line, in hexadecimal. A server reads its copy again when it changes.\n"
)


class Authority:
    """A CA: makes sites, one folder each.

    Attributes:
        folder: Where it is.
        certificate: Its own.
    """

    def __init__(self, folder: str | os.PathLike[str], pair: Pair) -> None:
        self.folder = Path(folder)
        self.certificate = pair.certificate
        self._pair = pair

    @classmethod
    def make(cls, folder: str | os.PathLike[str], name: str = "hosfl", days: int = 3650) -> Authority:
        """A new CA in a new folder, which is there whole or not at all.

        Raises:
            CertificateError: Something is in the folder, or the name is none.
        """
        folder = _vacant(folder, "a CA is never overwritten")
        pair = make_authority(name, days)
        write_folder(folder, {KEY: pair.key_pem, REVOKED: _HEAD, CERTIFICATE: pair.certificate_pem})
        return cls(folder, pair)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Authority:
        """The CA of a folder.

        Raises:
            CertificateError: There is none, or its key is not its certificate's.
        """
        path = Path(folder)
        for name in (CERTIFICATE, KEY):
            if not (path / name).is_file():
                raise CertificateError(f"{path} is no CA: it has no {name}; make one: hosfl certs init --out {path}")
        try:
            certificate = x509.load_pem_x509_certificate((path / CERTIFICATE).read_bytes())
            key = load_pem_private_key((path / KEY).read_bytes(), None)
        except (ValueError, TypeError):
            raise CertificateError(f"{path}: {CERTIFICATE} or {KEY} is damaged or has a password") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CertificateError(f"{path}: {KEY} is not the key of {CERTIFICATE}")
        return cls(path, Pair(certificate, key))

    def server(self, hosts: Sequence[str], out: str | os.PathLike[str], days: int = 365) -> x509.Certificate:
        """The folder of a server that clients find under ``hosts``, names and IP addresses.

        Raises:
            CertificateError: Something is in ``out``, a host is none, or the CA ends before.
        """
        out = _vacant(out, "a site is never overwritten")
        return self._write(make_server(self._pair, hosts, days), out, {REVOKED: self._revoked_text()})

    def client(self, name: str, out: str | os.PathLike[str], days: int = 365) -> x509.Certificate:
        """The folder of the client ``name``. One that it has stays valid, until it ends or is revoked.

        Raises:
            CertificateError: Something is in ``out``, the name is none, or the CA ends before.
        """
        out = _vacant(out, "a site is never overwritten")
        return self._write(make_client(self._pair, name, days), out, {})

    def issued(self) -> list[x509.Certificate]:
        """Every certificate that the CA signed, by the date of issue."""
        found = [x509.load_pem_x509_certificate(path.read_bytes()) for path in (self.folder / ISSUED).glob("*.crt")]
        return sorted(found, key=lambda one: (one.not_valid_before_utc, one.serial_number))

    def valid(self, name: str) -> list[x509.Certificate]:
        """Those of ``name`` that are neither past their end nor revoked."""
        now, revoked = datetime.now(UTC), self._revoked()
        return [
            one
            for one in self.issued()
            if common_name(one) == name and one.not_valid_after_utc > now and one.serial_number not in revoked
        ]

    def revoke(self, name: str | None = None, serial: int | None = None) -> list[x509.Certificate]:
        """Write every certificate of ``name``, or the one with ``serial``, into ``revoked.txt``.

        Returns:
            Those that were not revoked before.

        Raises:
            CertificateError: The CA has issued none such, or neither is given.
        """
        if name is None and serial is None:
            raise CertificateError("give the name or the serial number that is revoked")
        issued = self.issued()
        meant = [one for one in issued if name in (None, common_name(one)) and serial in (None, one.serial_number)]
        if not meant:
            known = ", ".join(sorted({common_name(one) for one in issued})) or "nobody"
            what = f"serial={serial:x}" if serial is not None else f"name={name!r}"
            raise CertificateError(f"{what}: {self.folder} has issued no such certificate; it has to {known}")
        before = self._revoked()
        new = [one for one in meant if one.serial_number not in before]
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        lines = [f"{one.serial_number:x}  # {common_name(one)}, revoked {today}\n".encode() for one in new]
        if new:
            text = self._revoked_text().rstrip(b"\n") + b"\n" + b"".join(lines)
            write_whole(self.folder / REVOKED, lambda file: file.write(text), mode=0o600)
        return new

    def _write(self, pair: Pair, out: Path, others: dict[str, bytes]) -> x509.Certificate:
        # On record before anyone can have it: what is not on record cannot be revoked by its name.
        record = self.folder / ISSUED / f"{pair.certificate.serial_number:x}.crt"
        write_whole(record, lambda file: file.write(pair.certificate_pem), mode=0o600)
        site = {"site.key": pair.key_pem, "site.crt": pair.certificate_pem, "ca.crt": self._pair.certificate_pem}
        write_folder(out, site | others)
        return pair.certificate

    def _revoked_text(self) -> bytes:
        path = self.folder / REVOKED
        return path.read_bytes() if path.is_file() else _HEAD

    def _revoked(self) -> frozenset[int]:
        return parse(self._revoked_text(), self.folder / REVOKED)


def _vacant(folder: str | os.PathLike[str], why: str) -> Path:
    path = Path(folder).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CertificateError(f"out={os.fspath(folder)} is there already, and {why}; give a new or an empty folder")
    return path
