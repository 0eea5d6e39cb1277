from __future__ import annotations

import os
from pathlib import Path

import pytest

from hosfl_lightning.data.sources import RECORDS, TEXTS, find_sources

NAMES = ["b.txt", "A.MD.GZ", "sub/c.jsonl", "sub/deep/d.CSV.gz", "x.pdf", ".hidden.txt", "_SUCCESS", "sub/.cache/e.txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "notes"


def found(source: str | list[str], folder: Path) -> list[str]:
    return [os.path.relpath(one.path, folder) for one in find_sources(source, "files", TEXTS + RECORDS)]


def test_a_folder_with_all_below_it_in_the_order_of_paths(folder: Path) -> None:
    assert found(str(folder), folder) == ["A.MD.GZ", "b.txt", "sub/c.jsonl", "sub/deep/d.CSV.gz"]
    assert [one.kind for one in find_sources(str(folder), "files", TEXTS + RECORDS)] == [
        ".md",
        ".txt",
        ".jsonl",
        ".csv",
    ]


def test_only_the_kinds_that_are_read_there(folder: Path) -> None:
    assert [one.name for one in find_sources(str(folder), "train", RECORDS)] == ["c.jsonl", "d.CSV.gz"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["A.MD.GZ", "b.txt", "sub/c.jsonl", "sub/deep/d.CSV.gz"]),
        ("**", ["A.MD.GZ", "b.txt", "sub/c.jsonl", "sub/deep/d.CSV.gz"]),
        ("*.txt", ["b.txt"]),
        ("**/*.[cj]*", ["sub/c.jsonl"]),
    ],
)
def test_globs(folder: Path, pattern: str, expected: list[str]) -> None:
    assert found(str(folder / pattern), folder) == expected


def test_a_list_keeps_its_order(folder: Path) -> None:
    listed = [str(folder / "sub"), str(folder / "*.txt")]
    assert found(listed, folder) == ["sub/c.jsonl", "sub/deep/d.CSV.gz", "b.txt"]


def test_a_name_with_the_signs_of_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert found(str(tmp_path / "a[1].txt"), tmp_path) == ["a[1].txt"]


def test_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert found("~/b.txt", folder) == ["b.txt"]


def test_files_of_one_name_are_told_apart_by_their_paths(folder: Path) -> None:
    (folder / "sub" / "b.txt").write_text("x")
    names = [one.name for one in find_sources(str(folder / "**" / "*.txt"), "files", TEXTS)]
    assert names == [str(folder / "b.txt"), str(folder / "sub" / "b.txt")]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("none.txt", FileNotFoundError, "files: there is no file or folder '.*none.txt'"),
        ("none", FileNotFoundError, "files: there is no file or folder"),
        ("sub/.cache/*.csv", FileNotFoundError, r"files: no file to read matches '.*\*.csv'; known are \.txt"),
        ("*.pdf", FileNotFoundError, "files: no file to read matches"),
        ("empty", FileNotFoundError, r"files: the folder '.*empty' holds no file to read; known are .* also with .gz"),
        ("x.pdf", ValueError, "files: unknown extension of '.*x.pdf'; known are .txt, .*.arrow, each also with .gz"),
        (["b.txt", "*.txt"], ValueError, "files: '.*b.txt' is named twice"),
        ([], ValueError, "files: name at least one file, folder or glob"),
    ],
)
def test_what_is_not_there(folder: Path, source: str | list[str], kind: type[Exception], message: str) -> None:
    (folder / "empty").mkdir()
    given = str(folder / source) if isinstance(source, str) else [str(folder / one) for one in source]
    with pytest.raises(kind, match=message) as caught:
        find_sources(given, "files", TEXTS + RECORDS)
    assert "\n" not in str(caught.value)
