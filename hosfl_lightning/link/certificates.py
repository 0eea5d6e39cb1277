"""X.509 certificates: of a CA, of a server, of a client. Nothing here touches the disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import NamedTuple

from hosfl_lightning.link.errors import CertificateError, IdentityError
from hosfl_lightning.link.extra import remote_extra
from hosfl_lightning.link.names import RULE, check_name, is_name

with remote_extra():
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: Clocks differ: how long before it is made a certificate is valid.
EARLY = timedelta(minutes=5)
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS = re.compile(rf"(?=.{{1,253}}$)(\*\.)?({_LABEL}\.)*(?![0-9]+$){_LABEL}", re.ASCII)
_ROLES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


class Pair(NamedTuple):
    """A certificate and its key, EC P-256."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as files hold it."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as files hold it, PKCS #8 without a password."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_authority(name: str, days: int) -> Pair:
    """A CA that signs sites, but no other CA.

    Raises:
        CertificateError: The name is none.
    """
    check_name(name, "name", CertificateError)
    return _make(name, days, [(_usage(signs_certificates=True), True), (x509.BasicConstraints(True, 0), True)])


def make_server(authority: Pair, hosts: Sequence[str], days: int) -> Pair:
    """For a server that clients find under ``hosts``, names and IP addresses. Its common name is the first that can be.

    Raises:
        CertificateError: A host is none, or the CA ends before.
    """
    alternatives = [_host(host) for host in hosts]
    if not alternatives:
        raise CertificateError("host: give the name or the IP address under which clients find the server")
    name = next(filter(is_name, hosts), "server")
    return _make(name, days, [(x509.SubjectAlternativeName(alternatives), False), *_site("server")], authority)


def make_client(authority: Pair, name: str, days: int) -> Pair:
    """For the client ``name``.

    Raises:
        CertificateError: The name is none, or the CA ends before.
    """
    check_name(name, "name", CertificateError)
    return _make(name, days, _site("client"), authority)


def common_name(certificate: x509.Certificate) -> str:
    """The name of the site that a certificate is for.

    Raises:
        IdentityError: It has none, several, or one that is not the name of a site.
    """
    found = [one.value for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(found) != 1:
        raise IdentityError(f"the certificate has {len(found)} common names; exactly one says whose it is")
    if not is_name(found[0]):
        raise IdentityError(f"the certificate's common name {found[0]!r} is not the name of a site; {RULE}")
    return str(found[0])


def role(certificate: x509.Certificate) -> str | None:
    """``"server"`` or ``"client"``; None: it may be used as both."""
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return None
    roles = [name for name, identifier in _ROLES.items() if identifier in usage]
    return roles[0] if len(roles) == 1 else None


def _make(
    name: str, days: int, extensions: list[tuple[x509.ExtensionType, bool]], authority: Pair | None = None
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority or Pair(None, key)  # type: ignore[arg-type]  # it signs itself
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    if authority is not None and end > authority.certificate.not_valid_after_utc:
        left = (authority.certificate.not_valid_after_utc - now).days
        raise CertificateError(
            f"days={days} ends after the CA, which ends on {authority.certificate.not_valid_after_utc:%Y-%m-%d}; "
            + (f"give days={left} at most" if left > 0 else "make a new CA")
        )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.certificate.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - EARLY)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return Pair(builder.sign(issuer.key, hashes.SHA256()), key)


def _site(role: str) -> list[tuple[x509.ExtensionType, bool]]:
    """No site signs certificates, no client serves, and no server joins."""
    return [
        (_usage(signs_certificates=False), True),
        (x509.BasicConstraints(False, None), True),
        (x509.ExtendedKeyUsage([_ROLES[role]]), False),
    ]


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        if _DNS.fullmatch(host):
            return x509.DNSName(host)
    raise CertificateError(
        f"host={host!r} is neither a host name nor an IP address; give it as clients write it, without port or brackets"
    )
