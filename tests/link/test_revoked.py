from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hosfl_lightning.link.errors import RevokedError
from hosfl_lightning.link.revoked import Revoked, parse_serial


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "revoked.txt"
    path.write_text("# serial numbers\n\nab12  # hospital-a, revoked\n 0xCD \nEF:01:02\n")
    return path


def test_serial_numbers_as_we_and_openssl_write_them(path: Path) -> None:
    assert Revoked(path).serials == {0xAB12, 0xCD, 0xEF0102}


def test_a_serial_number_is_in_or_not(path: Path) -> None:
    revoked = Revoked(path)
    assert 0xAB12 in revoked
    assert 0xAB13 not in revoked


def test_no_file_revokes_nobody_until_there_is_one(tmp_path: Path) -> None:
    revoked = Revoked(tmp_path / "revoked.txt")
    assert 1 not in revoked
    assert revoked.refresh() is False
    (tmp_path / "revoked.txt").write_text("1\n")
    assert 1 in revoked


def test_a_file_is_read_again_when_it_was_written(path: Path) -> None:
    revoked = Revoked(path)
    assert 0xAB12 in revoked
    path.write_text("ab12\nff\n")
    assert revoked.refresh() is True
    assert revoked.refresh() is False
    assert 0xFF in revoked
    path.write_text("ff\n# and no more\n")
    assert 0xAB12 not in revoked
    path.write_text("ff\n# and still no more\n")
    assert revoked.refresh() is False


@pytest.mark.parametrize("text", ["hospital-a", "ab12 cd", "-1", "+1", "1_0", "0x", ":1", "1:", "1::2", "٣", "\xff"])
def test_what_is_no_serial_number_is_named_by_its_line(path: Path, text: str) -> None:
    assert parse_serial(text) is None
    path.write_text(f"ab12\n{text}\n")
    with pytest.raises(RevokedError, match=r"revoked.txt, line 2: .* no serial number"):
        Revoked(path)


def test_a_file_that_cannot_be_read_is_no_reason_to_let_everybody_in(path: Path) -> None:
    path.unlink()
    path.mkdir()
    with pytest.raises(RevokedError, match=r"revoked.txt: Is a directory"):
        Revoked(path)
    path.rmdir()
    path.write_text("")
    with pytest.raises(RevokedError, match="Not a directory"):
        Revoked(path / "revoked.txt")


@pytest.mark.parametrize("text", ["", "\n", "ab12\nhalf a l", None])
def test_while_it_is_copied_everything_stays_revoked(path: Path, text: str | None) -> None:
    revoked = Revoked(path)
    path.unlink() if text is None else path.write_text(text)
    with pytest.warns(UserWarning, match=r"revoked.txt.*the 3 that were revoked before stay so") as seen:
        assert 0xCD in revoked
    assert len(seen) == 1
    with warnings.catch_warnings(record=True) as again:
        assert 0xCD in revoked
    assert again == []
    path.write_text("cd\nee\n")
    assert revoked.refresh() is True
    assert 0xEE in revoked


def test_an_empty_file_at_the_start_revokes_nobody(path: Path) -> None:
    path.write_text("")
    assert Revoked(path).serials == frozenset()
