"""What a site shows, its certificate, and what it learns of its peer: name and serial number."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

from hosfl_lightning.link.certificates import common_name, role
from hosfl_lightning.link.errors import CredentialsError, IdentityError
from hosfl_lightning.link.extra import remote_extra

with remote_extra():
    import grpc
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

Role = Literal["server", "client"]
#: Ours, and those of ``nvflare provision``.
AUTHORITIES = ("ca.crt", "rootCA.pem")
STEMS = ("site", "client", "server")


@dataclass(frozen=True)
class Site:
    """A certificate with its key and the CA whose peers it trusts, all PEM.

    Attributes:
        folder: Where they were read.
        name: The certificate's common name.
        serial: Its serial number.
        not_after: When it ends, in UTC.
        certificate: It, and those between it and the CA.
        key: Its key.
        authority: The CA's certificate, or several.
    """

    folder: Path
    name: str
    serial: int
    not_after: datetime
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    authority: bytes = field(repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], use: Role | None = None) -> Site:
        """Read ``ca.crt``, ``site.crt`` and ``site.key``; or ``rootCA.pem`` and ``client.*`` or ``server.*``.

        Args:
            folder: As ``hosfl certs`` or ``nvflare provision`` made it.
            use: What the certificate must be good for. None: it is not checked.

        Raises:
            CredentialsError: A file is missing or damaged, the key has a password or is another certificate's, the
                certificate is out of date, for another use, or not signed by the CA.
        """
        folder = Path(folder)
        authority_file = _one(folder, AUTHORITIES, "the certificate of the CA")
        stems = ("site", use) if use else STEMS
        certificate_file = _one(folder, [f"{stem}.crt" for stem in stems], "the site's certificate")
        key_file = certificate_file.with_suffix(".key")
        if not key_file.is_file():
            raise CredentialsError(f"{key_file} is missing; it lies where {certificate_file.name} was made")
        certificate, key, authority = (_bytes(path) for path in (certificate_file, key_file, authority_file))
        chain = _certificates(certificate, certificate_file)
        authorities = _certificates(authority, authority_file)
        _check_key(key, key_file, chain[0])
        for path, one in ((certificate_file, chain[0]), *((authority_file, one) for one in authorities)):
            _check_dates(one, path)
        if not _signed(chain, authorities):
            raise CredentialsError(f"{certificate_file} is not signed by {authority_file}; both must be of one CA")
        if use and role(chain[0]) not in (use, None):
            raise CredentialsError(
                f"{certificate_file} is the certificate of a {role(chain[0])}; make one: hosfl certs {use} --help"
            )
        try:
            name = common_name(chain[0])
        except IdentityError as error:
            raise CredentialsError(f"{certificate_file}: {error}") from error
        leaf = chain[0]
        return cls(folder, name, leaf.serial_number, leaf.not_valid_after_utc, certificate, key, authority)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For ``add_secure_port``: only peers with a certificate of the CA get through."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For ``secure_channel``: this site to a server whose certificate is of the CA, and of no other CA."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


@dataclass(frozen=True)
class Peer:
    """Who is at the other end.

    Attributes:
        name: The common name of its certificate.
        serial: The certificate's serial number.
    """

    name: str
    serial: int


def peer_name(auth_context: Mapping[str, Iterable[bytes]]) -> Peer:
    """Who called, by ``ServicerContext.auth_context()``; TLS has checked the certificate by then.

    Raises:
        IdentityError: There is no certificate, or it does not name exactly one site.
    """
    shown = list(auth_context.get("x509_pem_cert", ()))
    if len(shown) != 1:
        raise IdentityError(f"the peer showed {len(shown)} certificates; exactly one says who it is")
    try:
        certificate = x509.load_pem_x509_certificate(shown[0])
        return Peer(common_name(certificate), certificate.serial_number)
    except IdentityError:
        raise
    except (ValueError, x509.InvalidVersion) as error:
        raise IdentityError(f"the peer's certificate cannot be read: {error}") from error


def channel_options(server_name: str | None = None) -> list[tuple[str, str]]:
    """Options of a channel to a server whose certificate is for another name than the address that it is called by.

    gRPC compares the address with the certificate's alternative names, and with the common name if there are none. An
    IP address never matches a common name. The certificate must still be of the CA.

    Args:
        server_name: What the certificate says. None: what the address says.
    """
    return [] if server_name is None else [("grpc.ssl_target_name_override", server_name)]


def _one(folder: Path, names: Iterable[str], what: str) -> Path:
    """The file of the folder that has one of the names."""
    if not folder.is_dir():
        raise CredentialsError(f"{folder} is no folder; give the one that hosfl certs server or client made")
    names = list(names)
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise CredentialsError(f"{folder} has no {' or '.join(names)}, {what}")
    if len(found) > 1:
        raise CredentialsError(f"{folder} has {' and '.join(path.name for path in found)}; keep one, {what}")
    return found[0]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{path}: {error.strerror}") from error


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise CredentialsError(f"{path} is no certificate in PEM: {error}") from error


def _check_key(pem: bytes, path: Path, certificate: x509.Certificate) -> None:
    try:
        key = load_pem_private_key(pem, None)
        belongs = key.public_key() == certificate.public_key()
    except TypeError as error:
        raise CredentialsError(
            f"{path} has a password, which is not asked for; write it without: openssl pkey -in {path.name} -out NEW"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CredentialsError(f"{path} is no key in PEM") from error
    if not belongs:
        raise CredentialsError(f"{path} is not the key of {path.with_suffix('.crt').name}; both must be of one site")
    if path.stat().st_mode & 0o077:
        warnings.warn(f"{path} can be read by others than its owner: chmod 600 {path}", stacklevel=3)


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now, begin, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        raise CredentialsError(f"{path} is not valid before {begin:%Y-%m-%d %H:%M} UTC; is this machine's clock right?")
    if now > end:
        raise CredentialsError(f"{path} expired on {end:%Y-%m-%d %H:%M} UTC; ask for a new one (hosfl certs)")


def _signed(chain: list[x509.Certificate], authorities: list[x509.Certificate]) -> bool:
    """Whether each signed the one before it, and the CA the last: said early, since TLS will not say which."""
    return all(_issued(one, issuer) for one, issuer in pairwise(chain)) and any(
        _issued(chain[-1], authority) for authority in authorities
    )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
