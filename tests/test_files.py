from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import hosfl_lightning
from hosfl_lightning import files
from hosfl_lightning.files import append, truncate, write_folder, write_whole
from tests.faults import Killed, count_writes, killed_at, points

BIG = bytes(range(256)) * (5 << 10)  # more than one buffer


def failing_os(name: str, error: BaseException) -> Any:
    """``os`` whose ``name`` does half of its work, then fails."""

    class Failing:
        def __getattr__(self, attribute: str) -> Any:
            return fail if attribute == name else getattr(os, attribute)

    def fail(*args: Any) -> None:
        if name == "write":
            os.write(args[0], args[1][:2])
        raise error

    return Failing()


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.bin"
    write_whole(path, lambda file: file.write(b"old"))

    def fails(file: BinaryIO) -> None:
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_whole_file_has_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.bin", lambda file: file.write(b"a"))
    (tmp_path / "b.bin").write_bytes(b"b")
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "b.bin").stat().st_mode


def test_a_secret_is_one_before_it_has_a_byte(tmp_path: Path) -> None:
    """Also where a kill, or another, left a temporary file that all can read: whoever has opened it reads on in it."""
    path, left = tmp_path / "a.key", tmp_path / ".a.key.part"
    left.write_bytes(b"left")
    left.chmod(0o666)
    modes = []

    def write(file: BinaryIO) -> None:
        modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        file.write(b"secret")

    before = os.umask(0)
    try:
        with left.open("rb") as spy:
            write_whole(path, write, mode=0o600)
            assert spy.read() == b"left"
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"secret", 0o600)
    assert [one.name for one in tmp_path.iterdir()] == ["a.key"]


def test_a_secret_is_not_written_into_what_another_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where another is faster than the one who clears it away."""
    left = tmp_path / ".a.key.part"
    left.write_bytes(b"")

    class Racing:
        def __getattr__(self, name: str) -> Any:
            return (lambda path: left.write_bytes(b"")) if name == "unlink" else getattr(os, name)

    monkeypatch.setattr(files, "os", Racing())
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a.key", lambda file: file.write(b"secret"), mode=0o600)
    assert left.read_bytes() == b""


def test_wherever_the_process_is_killed_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    contents = {"a": b"1234", "b": b"5678"}
    with count_writes() as calls:
        write_folder(tmp_path / "whole", contents)
    assert calls == 2 * ["write", "fsync", "replace", "fsync"] + ["replace", "fsync"]
    for n, torn in points(calls):
        path = tmp_path / f"{n}{torn}"
        with pytest.raises(Killed), killed_at(n, torn):
            write_folder(path, contents)
        assert path.exists() == (n == len(calls) - 1)
        if not path.exists():
            write_folder(path, {"b": b"5678"} if n % 2 else contents)
            assert len([*path.iterdir()]) == (1 if n % 2 else 2), "nothing of what the kill left is in it"
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_wherever_the_process_is_killed_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def replaces() -> None:
        write_whole(path, lambda file: (file.write(BIG[:1000]), file.write(BIG[1000:])))

    with count_writes() as calls:
        replaces()
    assert calls == ["write", "write", "fsync", "replace", "fsync"]
    for n, torn in points(calls):
        path.write_bytes(b"old")
        with pytest.raises(Killed), killed_at(n, torn):
            replaces()
        assert path.read_bytes() == (b"old" if n < 4 else BIG), n
        replaces()
        assert path.read_bytes() == BIG
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"], "the next write clears away what the kill left"


def test_what_is_appended_is_synced_and_a_kill_leaves_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with count_writes() as calls:
        append(path, b"1234")
    assert calls == ["write", "fsync"]
    assert path.read_bytes() == b"old1234"
    found = []
    for n, torn in points(calls):
        path.write_bytes(b"old")
        with pytest.raises(Killed), killed_at(n, torn):
            append(path, b"1234")
        found.append(path.read_bytes())
    assert found == [b"old", b"old1234", b"old12"]


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_an_append_that_fails_leaves_nothing_so_that_the_next_one_follows_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(files, "os", failing_os(name, OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        append(path, b"1234")
    assert path.read_bytes() == b"old"


def test_a_write_that_takes_only_a_part_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stingy:
        def __getattr__(self, name: str) -> Any:
            return (lambda descriptor, data: os.write(descriptor, data[:3])) if name == "write" else getattr(os, name)

    path = tmp_path / "a.bin"
    monkeypatch.setattr(files, "os", Stingy())
    write_whole(path, lambda file: file.write(b"12345678"))
    append(path, b"abcdefgh")
    assert path.read_bytes() == b"12345678abcdefgh"


def test_what_is_synced_is_the_file_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watching:
        def __getattr__(self, name: str) -> Any:
            return self.fsync if name == "fsync" else getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_ino)

    path = tmp_path / "a.bin"
    synced: list[int] = []
    monkeypatch.setattr(files, "os", Watching())
    write_whole(path, lambda file: file.write(b"old"))
    append(path, b"new")
    truncate(path, 1)
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert synced == [file, folder, file, file]


def test_nothing_appears_by_appending(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        append(tmp_path / "a.bin", b"1234")
    assert not list(tmp_path.iterdir())


def test_a_cut_is_synced(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"123456")
    with count_writes() as calls:
        truncate(path, 2)
    assert calls == ["truncate", "fsync"]
    assert path.read_bytes() == b"12"


@pytest.mark.parametrize(
    "write", [lambda path: append(path, b"new"), lambda path: write_whole(path, lambda f: f.write(b"new"))]
)
def test_the_dead_write_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """What cleanup code does after the kill is what the disk must not show."""
    (tmp_path / "a.bin").write_bytes(b"old")

    def runs() -> None:
        try:
            truncate(tmp_path / "a.bin", 3)
        finally:
            write(tmp_path / "a.bin")

    with pytest.raises(Killed), killed_at(0):
        runs()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a.bin": b"old"}


def test_nobody_else_syncs_replaces_or_cuts_files() -> None:
    """Else a kill there would be tested by nobody."""
    package = Path(hosfl_lightning.__file__).parent
    calls = {f"os.{name}" for name in ("write", "fsync", "fdatasync", "replace", "rename", "truncate", "ftruncate")}
    found = [
        f"{path.relative_to(package)}: {ast.unparse(node)}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in calls
    ]
    assert found
    assert [call for call in found if not call.startswith("files.py")] == []


def test_json_has_null_where_a_number_is_none(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan"), (float("-inf"), None)], "b": {"c": float("inf"), "d": "NaN", "e": True}}
    files.write_json(tmp_path / "a.json", value)
    content = (tmp_path / "a.json").read_text()
    assert content == '{"a": [1.5, null, [null, null]], "b": {"c": null, "d": "NaN", "e": true}}\n'
