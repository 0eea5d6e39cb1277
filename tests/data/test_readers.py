from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hosfl_lightning.data.readers import Row, read_documents, read_hub, read_rows

Write = Callable[[str, Any], str]
RECORDS = [{"text": "good é", "label": 1}, {"text": "bad,\nworse", "label": 0}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_json_lines(write: Write, name: str) -> None:
    assert [row.fields for row in read_rows(write(name, RECORDS), "train")] == RECORDS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(write: Write, name: str) -> None:
    path = write(name, '\ufefftext,label\ngood é,1\n"bad,\nworse",0\n')
    rows = read_rows(path, "train")
    assert [row.fields for row in rows] == [{**record, "label": str(record["label"])} for record in RECORDS]
    assert rows[1].where.endswith("line 4")


def test_blank_lines_are_skipped_but_counted(write: Write) -> None:
    rows = read_rows(write("a.jsonl", '{"a": 1}\n\n  \n{"a": 2}'), "train")
    assert [row.where for row in rows] == ["a.jsonl line 1", "a.jsonl line 4"]


def test_a_unicode_line_separator_inside_a_string_is_no_new_line(write: Write) -> None:
    assert read_rows(write("a.jsonl", '{"a": "x\u2028y"}\n'), "train")[0].fields == {"a": "x\u2028y"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "train: .*a.jsonl' is empty"),
        ("a.jsonl", " \n\n", "is empty"),
        ("a.csv", "text,label\n", "train: .*a.csv' has no records"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl line 2: not valid JSON .Expecting value at column"),
        ("a.jsonl", "[1]\n", "a.jsonl line 1: a line must be a JSON object"),
        ("a.csv", "text,label\nx,1\ny\n", "a.csv line 3: the header names 2 columns"),
        ("a.csv", "text,label\nx,1,2\n", "a.csv line 2: the header names 2 columns"),
        ("a.csv", 'text\n"x\n', r"a.csv line \d: not valid CSV \(unexpected end"),
        ("a.jsonl", b"\xff\xfe", r"train: .*a.jsonl' is not UTF-8 text \(byte 0\)"),
        ("a.xlsx", "x", "train: unknown extension of .*a.xlsx'; known are .jsonl, .csv"),
        ("a", "x", "unknown extension"),
    ],
)
def test_bad_files_get_one_readable_line(write: Write, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(write(name, content), "train")
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"validation: there is no file .*none.jsonl"):
        read_rows(str(tmp_path / "none.jsonl"), "validation")


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"x" * 1000)[:-12], gzip.compress(b"")[:10] + b"\xff" * 20],
    ids=["other", "cut", "damaged"],
)
def test_broken_gzip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        read_rows(str(path), "train")


def test_a_missing_field_lists_those_that_exist() -> None:
    row = Row("a.jsonl line 3", {"text": "x", "label": None, "id": 4})
    with pytest.raises(ValueError, match=r"a.jsonl line 3: no field 'label' \(label_field\); .* are: text, id$"):
        row.field("label", "label_field")
    with pytest.raises(ValueError, match="line 3: text_field 'id' must be a non-empty string, not 4"):
        row.text("id", "text_field")


def test_documents(write: Write) -> None:
    assert read_documents(write("a.txt", "one\n\ntwo\n"), "text", "files") == ["one\n\ntwo\n"]
    assert read_documents(write("a.md.gz", "one"), "text", "files") == ["one"]
    assert read_documents(write("a.jsonl", [{"story": "x"}, {"story": "y"}]), "story", "files") == ["x", "y"]
    with pytest.raises(ValueError, match=r"no field 'text' \(text_field\)"):
        read_documents(write("a.jsonl", [{"story": "x"}]), "text", "files")
    with pytest.raises(ValueError, match=r"files: unknown extension .* \.txt, .*\.jsonl"):
        read_documents(write("a.pdf", "x"), "text", "files")


class FakeDataset(list):
    features = {"label": SimpleNamespace(names=["no", "yes"]), "text": SimpleNamespace()}


def test_hub_calls_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> FakeDataset:
        calls.append((name, config, split))
        return FakeDataset(RECORDS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows, names = read_hub("nyu/glue", "sst2", "train")
    assert calls == [("nyu/glue", "sst2", "train")]
    assert [row.fields for row in rows] == RECORDS
    assert rows[1].where == "nyu/glue train record 1"
    assert names == {"label": ["no", "yes"]}


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("no such dataset\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"^hub='x', hub_config=None, split 'train': no such dataset$"):
        read_hub("x", None, "train")


def test_a_hub_split_must_have_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, split: FakeDataset()))
    with pytest.raises(ValueError, match=r"^hub='x': split 'train' has no records$"):
        read_hub("x", None, "train")


def test_hub_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hub='x' needs .* pip install 'hosfl_lightning\[hub\]'"):
        read_hub("x", None, "train")


def test_hub_with_the_real_library(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write("set/train.jsonl", RECORDS)
    rows, names = read_hub(str(tmp_path / "set"), None, "train")
    assert [row.fields for row in rows] == RECORDS
    assert names == {}
    with pytest.raises(ValueError, match="split 'test'"):
        read_hub(str(tmp_path / "set"), None, "test")
