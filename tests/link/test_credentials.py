"""What is wrong with a site's folder is said by name, before anything connects."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.credentials import Peer, Site, channel_options, peer_name
from hosfl_lightning.link.errors import CredentialsError, IdentityError
from tests.link.sites import Foreign, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    for name in ("ca", "other"):
        authority = Authority.make(root / name)
        make(authority, root / f"{name}-client", "hospital-a")
        make(authority, root / f"{name}-server")
    make(Authority.load(root / "ca"), root / "expired", "hospital-a", days=-1)
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "ca-client", tmp_path / "client")


def test_a_site_knows_who_it_is(made: Path) -> None:
    site = Site.load(made / "ca-client")
    [issued] = [x509.load_pem_x509_certificate((made / "ca-client" / "site.crt").read_bytes())]
    assert (site.name, site.serial, site.not_after) == ("hospital-a", issued.serial_number, issued.not_valid_after_utc)
    assert site == Site.load(made / "ca-client", "client")
    assert Site.load(made / "ca-server", "server").name == "localhost"


def test_nothing_prints_a_key(made: Path) -> None:
    site = Site.load(made / "ca-client")
    assert b"PRIVATE KEY" in site.key
    assert "PRIVATE" not in repr(site) + str(site)


def test_each_missing_file_is_named(folder: Path) -> None:
    for name, words in (
        ("ca.crt", "no ca.crt or rootCA.pem"),
        ("site.crt", "no site.crt"),
        ("site.key", "site.key is missing"),
    ):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(CredentialsError, match=words):
            Site.load(folder)
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    Site.load(folder)
    with pytest.raises(CredentialsError, match="nowhere is no folder"):
        Site.load(folder / "nowhere")


def replaced(name: str, source: str) -> Callable[[Path, Path], None]:
    def replace(folder: Path, made: Path) -> None:
        (folder / name).write_bytes((made / source).read_bytes())

    return replace


def damaged(name: str) -> Callable[[Path, Path], None]:
    def damage(folder: Path, made: Path) -> None:
        (folder / name).write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")

    return damage


def locked(folder: Path, made: Path) -> None:
    key = load_pem_private_key((folder / "site.key").read_bytes(), None)
    (folder / "site.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )


WRONG = {
    "another's key": (replaced("site.key", "other-client/site.key"), r"site.key is not the key of site.crt"),
    "another's CA": (replaced("ca.crt", "other/ca.crt"), r"site.crt is not signed by .*ca.crt"),
    "damaged certificate": (damaged("site.crt"), r"site.crt is no certificate"),
    "damaged CA": (damaged("ca.crt"), r"ca.crt is no certificate"),
    "damaged key": (damaged("site.key"), r"site.key is no key"),
    "password": (locked, r"site.key has a password.*openssl pkey"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(folder: Path, made: Path, what: str) -> None:
    change, words = WRONG[what]
    change(folder, made)
    with pytest.raises(CredentialsError, match=words):
        Site.load(folder)


def test_an_expired_certificate_is_named_with_its_date(made: Path) -> None:
    certificate = x509.load_pem_x509_certificate((made / "expired" / "site.crt").read_bytes())
    with pytest.raises(CredentialsError, match=rf"site.crt expired on {certificate.not_valid_after_utc:%Y-%m-%d}"):
        Site.load(made / "expired")


def test_an_expired_ca_is_named(made: Path, folder: Path, tmp_path: Path) -> None:
    ended = Authority.make(tmp_path / "ended", days=-1)
    (folder / "ca.crt").write_bytes((folder / "ca.crt").read_bytes() + ended.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(CredentialsError, match=r"ca\.crt expired"):
        Site.load(folder)


def test_a_certificate_of_tomorrow_is_named(tmp_path: Path) -> None:
    folder = Foreign().folder(tmp_path / "a", "client", "a", begin=timedelta(days=1))
    with pytest.raises(CredentialsError, match=r"client.crt is not valid before .* clock"):
        Site.load(folder)


def test_a_key_that_others_can_read_is_warned_of(folder: Path) -> None:
    (folder / "site.key").chmod(0o640)
    with pytest.warns(UserWarning, match=r"site.key can be read by others.*chmod 600") as seen:
        Site.load(folder)
    assert [one.filename for one in seen] == [__file__]


def test_a_certificate_is_for_one_use(made: Path) -> None:
    with pytest.raises(CredentialsError, match=r"site.crt is the certificate of a client.*hosfl certs server"):
        Site.load(made / "ca-client", "server")
    with pytest.raises(CredentialsError, match=r"certificate of a server.*hosfl certs client"):
        Site.load(made / "ca-server", "client")


def test_names_of_other_tools(tmp_path: Path) -> None:
    foreign = Foreign()
    for stem in ("client", "server"):
        assert Site.load(foreign.folder(tmp_path / stem, stem, "site-1")).name == "site-1"
    both = foreign.folder(foreign.folder(tmp_path / "both", "client", "site-1"), "server", "host")
    assert Site.load(both, "client").name == "site-1"
    assert Site.load(both, "server").name == "host"
    with pytest.raises(CredentialsError, match=r"has client.crt and server.crt; keep one"):
        Site.load(both)


def test_a_certificate_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match=r"client.crt: .*2 common names"):
        Site.load(Foreign().folder(tmp_path / "a", "client", "a", "b"))


def test_a_chain_leads_to_the_ca(tmp_path: Path) -> None:
    """A CA between: its certificate stands behind the site's."""
    root, between = Foreign("root"), Foreign("between")
    between.certificate = root.sign(["between"], between.key)
    folder = between.folder(tmp_path / "a", "client", "a")
    (folder / "rootCA.pem").write_bytes(root.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(CredentialsError, match="not signed by"):
        Site.load(folder)
    with (folder / "client.crt").open("ab") as file:
        file.write(between.certificate.public_bytes(Encoding.PEM))
    assert Site.load(folder).name == "a"
    stranger = Foreign().folder(tmp_path / "b", "client", "b")
    (stranger / "rootCA.pem").write_bytes((folder / "rootCA.pem").read_bytes())
    with (stranger / "client.crt").open("ab") as file:
        file.write(between.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(CredentialsError, match="not signed by"):
        Site.load(stranger)


def test_a_peer_is_who_its_certificate_says(made: Path) -> None:
    site = Site.load(made / "ca-client")
    assert peer_name({"x509_pem_cert": [site.certificate]}) == Peer("hospital-a", site.serial)


def test_a_peer_that_says_nothing_or_too_much_is_refused(made: Path) -> None:
    one = Site.load(made / "ca-client").certificate
    two = Foreign().sign(["a", "b"], load_pem_private_key(Site.load(made / "ca-client").key, None))
    for shown, words in (
        ([], "0 certificates"),
        ([one, one], "2 certificates"),
        ([b"x"], "cannot be read"),
        ([two.public_bytes(Encoding.PEM)], "2 common names"),
    ):
        with pytest.raises(IdentityError, match=words):
            peer_name({"x509_pem_cert": shown})
    with pytest.raises(IdentityError, match="0 certificates"):
        peer_name({})


def test_options_are_for_another_name_only() -> None:
    assert channel_options() == []
    assert channel_options("host") == [("grpc.ssl_target_name_override", "host")]


@pytest.mark.parametrize("library", ["grpc", "cryptography"])
def test_a_missing_library_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for module in [name for name in sys.modules if name.startswith("hosfl_lightning.link")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=rf"need {library}.*pip install 'hosfl_lightning\[remote\]'"):
        import hosfl_lightning.link.credentials  # noqa: F401
