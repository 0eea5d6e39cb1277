"""The folders of a CA and its sites: rights, kills, refusals."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cryptography import x509

from hosfl_lightning import files
from hosfl_lightning.link.authority import Authority
from hosfl_lightning.link.certificates import common_name
from hosfl_lightning.link.credentials import Site
from hosfl_lightning.link.errors import CertificateError
from hosfl_lightning.link.revoked import Revoked
from tests.faults import Killed, count_writes, killed_at, points


@pytest.fixture(autouse=True)
def _open_to_all() -> Iterator[None]:
    """A user who forbids nothing: rights are those that are asked for."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "ca")


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "ca": lambda root: Authority.make(root / "ca"),
    "server": lambda root: Authority.load(root / "ca").server(["localhost"], root / "server"),
    "client": lambda root: Authority.load(root / "ca").client("a", root / "client"),
}
CONTENTS = {
    "ca": {"ca.crt", "ca.key", "revoked.txt"},
    "server": {"ca.crt", "site.crt", "site.key", "revoked.txt"},
    "client": {"ca.crt", "site.crt", "site.key"},
}


def prepare(root: Path, what: str) -> None:
    root.mkdir(exist_ok=True)
    if what != "ca":
        Authority.make(root / "ca")


@pytest.mark.parametrize("what", MAKERS)
def test_a_folder_holds_what_it_should_and_only_its_owner_reads_it(tmp_path: Path, what: str) -> None:
    prepare(tmp_path, what)
    MAKERS[what](tmp_path)
    assert {path.name for path in (tmp_path / what).iterdir()} == CONTENTS[what]
    assert rights(tmp_path / what) == 0o700
    assert {rights(path) for path in (tmp_path / what).iterdir()} == {0o600}


@pytest.mark.parametrize("what", MAKERS)
def test_at_no_moment_can_others_read_a_key(tmp_path: Path, what: str) -> None:
    prepare(tmp_path, what)
    seen: set[tuple[str, int]] = set()

    class Watching:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            return (lambda *args, **kwargs: self.call(real, *args, **kwargs)) if callable(real) else real

        def call(self, real: Any, *args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            for path in tmp_path.rglob("*"):
                if "key" in path.name and path.is_file():
                    seen.add((path.name, rights(path)))
            return result

    with mock.patch.object(files, "os", Watching()):
        MAKERS[what](tmp_path)
    key = "ca.key" if what == "ca" else "site.key"
    assert {(key, 0o600), (f".{key}.part", 0o600)} <= seen
    assert {mode for _, mode in seen} == {0o600}


@pytest.mark.parametrize("what", MAKERS)
def test_wherever_the_process_is_killed_the_folder_is_whole_or_not_there(tmp_path: Path, what: str) -> None:
    prepare(tmp_path / "whole", what)
    with count_writes() as calls:
        MAKERS[what](tmp_path / "whole")
    for n, torn in points(calls):
        root = tmp_path / f"{n}{torn}"
        prepare(root, what)
        with pytest.raises(Killed), killed_at(n, torn):
            MAKERS[what](root)
        if (root / what).exists():
            assert n > calls.index("replace")
            assert {path.name for path in (root / what).iterdir()} == CONTENTS[what]
        else:
            MAKERS[what](root)  # the next try clears away what the kill left
        usable(root, what)
        assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def usable(root: Path, what: str) -> None:
    if what == "ca":
        Authority.load(root / "ca").client("b", root / "b")
        return
    site = Site.load(root / what)
    assert site.serial in [one.serial_number for one in Authority.load(root / "ca").issued()]


def test_a_site_is_on_record_before_anyone_can_have_it(authority: Authority, tmp_path: Path) -> None:
    """Else a kill leaves a certificate that no name can revoke."""
    with count_writes() as calls:
        authority.client("a", tmp_path / "a")
    last = len(calls) - 1 - calls[::-1].index("replace")
    with pytest.raises(Killed), killed_at(last):
        authority.client("b", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert {common_name(one) for one in authority.issued()} == {"a", "b"}


def test_a_write_that_fails_leaves_no_key(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("disk full")

    class Full:
        def __getattr__(self, name: str) -> Any:
            return full if name == "replace" and list(tmp_path.rglob("*site.crt*")) else getattr(os, name)

    monkeypatch.setattr(files, "os", Full())
    with pytest.raises(OSError, match="disk full"):
        authority.client("a", tmp_path / "a")
    assert list(tmp_path.rglob("*site*")) == []
    assert {path.name for path in tmp_path.iterdir()} == {"ca"}


@pytest.mark.parametrize("what", MAKERS)
def test_nothing_is_overwritten(tmp_path: Path, what: str) -> None:
    prepare(tmp_path, what)
    MAKERS[what](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CertificateError, match=rf"out=.*{what} is there already.*a new or an empty folder"):
        MAKERS[what](tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_not_even_what_came_in_between(tmp_path: Path) -> None:
    """Of two that are started at once, one ends with an error: the rename takes no folder with something in it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ca.key").write_bytes(b"another")
    with pytest.raises(OSError, match="not empty"):
        files.write_folder(tmp_path / "a", {"ca.key": b"mine"})
    assert (tmp_path / "a" / "ca.key").read_bytes() == b"another"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir(mode=0o777)
    Authority.make(tmp_path / "ca")
    assert rights(tmp_path / "ca") == 0o700


def test_a_bad_name_leaves_nothing(authority: Authority, tmp_path: Path) -> None:
    for make in (lambda: authority.client("a b", tmp_path / "a"), lambda: authority.server(["a b"], tmp_path / "a")):
        with pytest.raises(CertificateError):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]
    assert authority.issued() == []


@pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
def test_a_folder_that_is_no_ca_is_named(authority: Authority, name: str) -> None:
    (authority.folder / name).rename(authority.folder / "elsewhere")
    with pytest.raises(CertificateError, match=rf"no CA: it has no {name}.*hosfl certs init"):
        Authority.load(authority.folder)
    (authority.folder / name).write_bytes(b"-----BEGIN")
    with pytest.raises(CertificateError, match="is damaged"):
        Authority.load(authority.folder)


def test_the_key_of_another_ca_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.make(tmp_path / "other")
    (authority.folder / "ca.key").write_bytes((other.folder / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match="not the key of"):
        Authority.load(authority.folder)


def test_everything_of_a_name_is_revoked_and_nothing_else(authority: Authority, tmp_path: Path) -> None:
    a = [authority.client("a", tmp_path / f"a{n}").serial_number for n in range(2)]
    b = authority.client("b", tmp_path / "b").serial_number
    server = authority.server(["localhost"], tmp_path / "server").serial_number
    revoked = authority.revoke("a")
    assert {one.serial_number for one in revoked} == {*a}
    assert Revoked(authority.folder / "revoked.txt").serials == {*a}
    assert authority.valid("a") == []
    assert [one.serial_number for one in authority.valid("b")] == [b]
    assert authority.revoke("a") == []
    [again] = authority.revoke(serial=server)
    assert common_name(again) == "localhost"
    assert Revoked(authority.folder / "revoked.txt").serials == {*a, server}
    assert rights(authority.folder / "revoked.txt") == 0o600
    authority.server(["localhost"], tmp_path / "second")
    assert Revoked(tmp_path / "second" / "revoked.txt").serials == {*a, server}


def test_a_revocation_adds_to_what_was_written_by_hand(authority: Authority, tmp_path: Path) -> None:
    serial = authority.client("a", tmp_path / "a").serial_number
    (authority.folder / "revoked.txt").write_text("# mine\nab:cd # by hand, and no new line")
    authority.revoke("a")
    assert (authority.folder / "revoked.txt").read_text().startswith("# mine\nab:cd # by hand, and no new line\n")
    assert Revoked(authority.folder / "revoked.txt").serials == {0xABCD, serial}


def test_who_was_never_issued_one_cannot_be_revoked(authority: Authority, tmp_path: Path) -> None:
    authority.client("a", tmp_path / "a")
    before = (authority.folder / "revoked.txt").read_bytes()
    with pytest.raises(CertificateError, match=r"name='b'.*it has to a"):
        authority.revoke("b")
    with pytest.raises(CertificateError, match="serial=beef"):
        authority.revoke(serial=0xBEEF)
    with pytest.raises(CertificateError, match="give the name or the serial"):
        authority.revoke()
    assert (authority.folder / "revoked.txt").read_bytes() == before


def test_a_kill_while_revoking_leaves_the_old_list_or_the_new(authority: Authority, tmp_path: Path) -> None:
    first = authority.client("b", tmp_path / "b").serial_number
    authority.revoke("b")
    second = authority.client("a", tmp_path / "a").serial_number
    before = (authority.folder / "revoked.txt").read_bytes()
    with count_writes() as calls:
        authority.revoke("a")
    for n, torn in points(calls):
        (authority.folder / "revoked.txt").write_bytes(before)
        with pytest.raises(Killed), killed_at(n, torn):
            authority.revoke("a")
        assert Revoked(authority.folder / "revoked.txt").serials in ({first}, {first, second})


def test_an_expired_certificate_is_not_a_valid_one(authority: Authority, tmp_path: Path) -> None:
    authority.client("a", tmp_path / "a", days=-1)
    assert authority.valid("a") == []
    assert isinstance(authority.issued()[0], x509.Certificate)
