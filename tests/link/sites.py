"""Sites of a CA of ours, and those that another tool made: RSA keys, names in the subject alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.credentials import Site

HOSTS = ["localhost", "127.0.0.1"]


def make(authority: Authority, out: Path, name: str = "", days: int = 365) -> Path:
    """The folder of the client ``name``, or of a server on this machine."""
    if name:
        authority.client(name, out, days)
    else:
        authority.server(HOSTS, out, days)
    return out


class Foreign:
    """A CA as others make it: no key usage, no extensions that are not needed, and all files as readable as any."""

    def __init__(self, name: str = "project") -> None:
        self.key: Any = rsa.generate_private_key(65537, 2048)
        self.certificate = self.sign([name], self.key, authority=True)

    def sign(
        self, names: list[str], key: Any, authority: bool = False, begin: timedelta = timedelta(0)
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if authority else self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1) + begin)
            .not_valid_after(now + timedelta(days=9))
        )
        if authority:
            builder = builder.add_extension(x509.BasicConstraints(True, None), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def folder(self, out: Path, stem: str, *names: str, begin: timedelta = timedelta(0)) -> Path:
        """``rootCA.pem``, ``STEM.crt``, ``STEM.key``."""
        key = ec.generate_private_key(ec.SECP256R1())
        out.mkdir(exist_ok=True)
        (out / "rootCA.pem").write_bytes(self.certificate.public_bytes(Encoding.PEM))
        (out / f"{stem}.crt").write_bytes(self.sign([*names], key, begin=begin).public_bytes(Encoding.PEM))
        (out / f"{stem}.key").touch(0o600)
        (out / f"{stem}.key").write_bytes(key_pem(key))
        return out


def key_pem(key: Any) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def unchecked(folder: Path) -> Site:
    """A folder of ours, whatever is wrong with it: what an attacker, or a clock, would bring to a handshake."""
    certificate, key, authority = ((folder / name).read_bytes() for name in ("site.crt", "site.key", "ca.crt"))
    leaf = x509.load_pem_x509_certificate(certificate)
    return Site(folder, "unchecked", leaf.serial_number, leaf.not_valid_after_utc, certificate, key, authority)
