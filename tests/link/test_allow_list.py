from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from hosfl_lightning.link.allow_list import AllowList
from hosfl_lightning.link.errors import AllowListError

LIST = "0: hospital-a\n1: hospital-b\n2:    # nobody\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "clients.yaml"
    path.write_text(LIST)
    return path


def test_numbers_and_names(path: Path) -> None:
    allowed = AllowList(path)
    assert (allowed.total, allowed.names) == (3, {0: "hospital-a", 1: "hospital-b"})
    assert [allowed.number_of(name) for name in ("hospital-a", "hospital-b", "hospital-c")] == [0, 1, None]
    assert allowed.number_of("") is None


def test_numbers_may_have_gaps(path: Path) -> None:
    path.write_text("5: b\n0: a\n")
    allowed = AllowList(path)
    assert (allowed.total, list(allowed.names.items())) == (6, [(0, "a"), (5, "b")])


def test_from_python(path: Path) -> None:
    allowed = AllowList.of({0: "a", 1: "b", 3: None})
    assert (allowed.total, allowed.names, allowed.number_of("b")) == (4, {0: "a", 1: "b"}, 1)
    assert allowed.refresh() is False
    with pytest.raises(AllowListError, match="the allow list: client 1: a is another client"):
        AllowList.of({0: "a", 1: "a"})


BAD = {
    "": "no list of clients",
    "{}": "no clients",
    "[a, b]": "no list of clients",
    "a": "no list of clients",
    "0: a\n1: b\n0: c\n": "line 3: client 0 is there twice",
    "0: a\n0x0: c\n": "line 2: client 0 is there twice",
    "0: a\n1: a\n": "line 2: client 1: a is another client already",
    "0: a\n-1: b\n": "line 2: -1 is no number",
    "0: a\ntrue: b\n": "line 2: True is no number",
    "0: a\n1.0: b\n": r"line 2: 1\.0 is no number",
    "0: a\nb: c\n": "line 2: 'b' is no number",
    "0: a\n'1': c\n": "line 2: '1' is no number",
    "0: a b\n": "line 1: client 0: 'a b' is not the name of a site",
    "0: 123\n": "line 1: client 0: 123 .* in quotes: '123'",
    "0: ''\n": "line 1: client 0: '' is not",
    "0: [a]\n": "line 1: .* no lists",
    "0: {a: b}\n": "line 1: .* no lists",
    "? [0]\n: a\n": "line 1: .* no lists",
    "0: a\n1: b: c\n": "line 2",
    "0: a\n---\n1: b\n": "line 2",
    "0: !!python/object/apply:os.getcwd []\n": "no lists",
    "0: !!python/name:os.getcwd ''\n": "constructor",
    "0: 2026-13-45\n": "month",
    "0: \x00": "special characters",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_list_is_refused_by_file_and_line(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(AllowListError, match=BAD[text]) as refused:
        AllowList(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AllowListError, match=r"clients.yaml: No such file"):
        AllowList(tmp_path / "clients.yaml")
    (tmp_path / "clients.yaml").write_bytes(b"0: \xff")
    with pytest.raises(AllowListError, match=r"clients.yaml: .*decode"):
        AllowList(tmp_path / "clients.yaml")


def test_a_list_is_read_again_when_it_was_written(path: Path) -> None:
    allowed = AllowList(path)
    assert allowed.refresh() is False
    path.write_text("0: hospital-c\n1:\n2: hospital-b\n")
    assert allowed.number_of("hospital-b") == 1, "not before it is asked to"
    assert allowed.refresh() is True
    assert (allowed.total, allowed.names) == (3, {0: "hospital-c", 2: "hospital-b"})
    assert allowed.number_of("hospital-a") is None
    assert allowed.number_of("hospital-b") == 2
    path.write_text("# the same\n0: hospital-c\n1:\n2: hospital-b\n")
    assert allowed.refresh() is False


def test_a_file_in_its_place_is_seen_though_time_and_size_are_the_same(path: Path) -> None:
    allowed, before = AllowList(path), path.stat()
    other = path.with_name("other")
    other.write_text(LIST.replace("hospital-a", "hospital-z"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert allowed.refresh() is True
    assert allowed.names[0] == "hospital-z"


def test_a_run_keeps_its_number_of_clients(path: Path) -> None:
    allowed = AllowList(path)
    path.write_text("0: a\n")
    assert allowed.refresh() is True
    assert (allowed.total, allowed.names) == (3, {0: "a"})
    path.write_text("0: b\n3: c\n")
    with pytest.warns(UserWarning, match="client 3, but the run has 3 clients.*a new run; the list stays as it was"):
        assert allowed.refresh() is False
    assert (allowed.total, allowed.names) == (3, {0: "a"})


@pytest.mark.parametrize("text", ["", "0: a\n0: b\n", None])
def test_a_bad_list_later_changes_nothing_and_is_said_once(path: Path, text: str | None) -> None:
    allowed = AllowList(path)
    before = allowed.names
    path.unlink() if text is None else path.write_text(text)
    with pytest.warns(UserWarning, match=r"clients.yaml.*the list stays as it was") as seen:
        assert allowed.refresh() is False
    assert len(seen) == 1
    with warnings.catch_warnings(record=True) as again:
        assert allowed.refresh() is False
    assert again == []
    assert allowed.names == before
    path.write_text("0: a\n")
    assert allowed.refresh() is True
