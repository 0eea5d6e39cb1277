from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from hosfl_lightning.link.certificates import Pair, common_name, make_authority, make_client, make_server, role
from hosfl_lightning.link.errors import CertificateError, IdentityError
from tests.link.sites import Foreign


@pytest.fixture(scope="module")
def authority() -> Pair:
    return make_authority("hosfl", 3650)


def extension(pair: Pair, kind: Any) -> Any:
    """Its value and whether it is critical."""
    found = pair.certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


def allowed(pair: Pair) -> set[str]:
    usage, critical = extension(pair, x509.KeyUsage)
    assert critical
    names = ("digital_signature", "key_cert_sign", "crl_sign", "content_commitment", "key_encipherment")
    return {name for name in (*names, "data_encipherment", "key_agreement") if getattr(usage, name)}


def test_a_ca_signs_certificates_but_no_other_ca(authority: Pair) -> None:
    assert extension(authority, x509.BasicConstraints) == (x509.BasicConstraints(True, 0), True)
    assert allowed(authority) == {"key_cert_sign", "crl_sign"}
    authority.certificate.verify_directly_issued_by(authority.certificate)


@pytest.mark.parametrize("use", ["server", "client"])
def test_a_site_may_do_one_thing(authority: Pair, use: str) -> None:
    site = make_server(authority, ["a.org"], 9) if use == "server" else make_client(authority, "a", 9)
    usage = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}[use]
    assert list(extension(site, x509.ExtendedKeyUsage)[0]) == [usage]
    assert role(site.certificate) == use
    assert extension(site, x509.BasicConstraints) == (x509.BasicConstraints(False, None), True)
    assert allowed(site) == {"digital_signature"}
    site.certificate.verify_directly_issued_by(authority.certificate)


def test_identifiers_lead_from_a_site_to_its_ca(authority: Pair) -> None:
    site = make_client(authority, "a", 9)
    subject, _ = extension(authority, x509.SubjectKeyIdentifier)
    for pair in (authority, site):
        assert extension(pair, x509.AuthorityKeyIdentifier)[0].key_identifier == subject.key_identifier
    assert extension(site, x509.SubjectKeyIdentifier)[0].key_identifier != subject.key_identifier


def test_keys_are_p256_and_serial_numbers_differ(authority: Pair) -> None:
    one, two = make_client(authority, "a", 9), make_client(authority, "a", 9)
    assert isinstance(one.key.curve, ec.SECP256R1)
    assert one.certificate.serial_number != two.certificate.serial_number
    assert one.key_pem != two.key_pem
    assert one.key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")


def test_a_certificate_is_valid_for_days_and_begins_early(authority: Pair) -> None:
    certificate = make_client(authority, "a", 9).certificate
    now = datetime.now(UTC)
    assert timedelta(0) <= now - timedelta(minutes=5) - certificate.not_valid_before_utc < timedelta(minutes=1)
    assert timedelta(0) <= now + timedelta(days=9) - certificate.not_valid_after_utc < timedelta(minutes=1)


def test_no_site_outlives_its_ca() -> None:
    authority = make_authority("hosfl", 20)
    make_client(authority, "a", 19)
    with pytest.raises(CertificateError, match=r"days=21 ends after the CA.*give days=19 at most"):
        make_client(authority, "a", 21)
    with pytest.raises(CertificateError, match="make a new CA"):
        make_server(make_authority("hosfl", -1), ["a"], 1)


def test_a_server_has_names_and_addresses(authority: Pair) -> None:
    site = make_server(authority, ["::1", "fl.example.org", "10.0.0.1", "*.example.org", "fl_server"], 9)
    alternatives, _ = extension(site, x509.SubjectAlternativeName)
    assert alternatives.get_values_for_type(x509.DNSName) == ["fl.example.org", "*.example.org", "fl_server"]
    assert alternatives.get_values_for_type(x509.IPAddress) == [ip_address("::1"), ip_address("10.0.0.1")]
    assert common_name(site.certificate) == "fl.example.org"
    assert common_name(make_server(authority, ["::1"], 9).certificate) == "server"


@pytest.mark.parametrize(
    "host", ["", "a:50051", "[::1]", "https://a", "a b", "-a", "a..b", "a-", "300.1.1.1", "bücher.de", "a" * 64, "a\n"]
)
def test_what_is_no_host_is_refused(authority: Pair, host: str) -> None:
    with pytest.raises(CertificateError, match="host="):
        make_server(authority, ["localhost", host], 9)


def test_a_server_has_a_host(authority: Pair) -> None:
    with pytest.raises(CertificateError, match="host: give"):
        make_server(authority, [], 9)


@pytest.mark.parametrize("name", ["a", "hospital-a.ward_3", "9", "a" * 64])
def test_names(authority: Pair, name: str) -> None:
    assert common_name(make_client(authority, name, 9).certificate) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "../a", "a\n", "ä", "a" * 65, "a,CN=b", "٣"])
def test_what_is_no_name_is_refused(authority: Pair, name: str) -> None:
    for make in (lambda: make_client(authority, name, 9), lambda: make_authority(name, 9)):
        with pytest.raises(CertificateError, match="name="):
            make()


@pytest.mark.parametrize(("names", "words"), [([], "0 common names"), (["a", "b"], "2 common"), (["a b"], "'a b'")])
def test_a_certificate_of_nobody_or_of_several_names_nobody(names: list[str], words: str) -> None:
    with pytest.raises(IdentityError, match=words):
        common_name(Foreign().sign(names, ec.generate_private_key(ec.SECP256R1())))


def test_a_certificate_without_usage_may_do_both() -> None:
    assert role(Foreign().certificate) is None
