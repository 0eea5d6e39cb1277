from __future__ import annotations

import csv
import gzip
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset

from hosfl_lightning.data.readers import Reader, Records
from hosfl_lightning.data.rows import Row
from tests.data.formats import FORMATS, arrow, save_splits, write_records

Write = Callable[[str, Any], str]
RECORDS = [{"text": "good é", "label": "1"}, {"text": 'bad,\tworse\n"x"', "label": "0"}]


def anything(row: Row) -> None:
    """Of a record that may be any."""


def read(source: str | list[str], setting: str = "train", **settings: Any) -> Records:
    return Reader(**settings).rows(source, setting, anything)


def fields(source: str | list[str], **settings: Any) -> list[dict[str, Any]]:
    return [row.fields for row in read(source, **settings).rows]


def places(source: str | list[str], **settings: Any) -> list[str]:
    return [row.where for row in read(source, **settings).rows]


class TestFormats:
    @pytest.mark.parametrize("gz", ["", ".gz"])
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_all_hold_the_same_records_in_any_case(self, tmp_path: Path, suffix: str, gz: str) -> None:
        for name in (f"a{suffix}{gz}", f"B{suffix}{gz}".upper()):
            assert fields(write_records(tmp_path, name, RECORDS)) == RECORDS

    def test_a_folder_of_save_to_disk(self, tmp_path: Path) -> None:
        path = write_records(tmp_path, "saved", RECORDS)
        assert fields(path) == RECORDS
        assert places(path)[1] == "saved record 1"
        assert fields(str(tmp_path)) == fields([str(tmp_path / "*")]) == fields(str(tmp_path / "**")) == RECORDS

    def test_arrow_streams(self, write: Write) -> None:
        assert fields(write("a.arrow", arrow(RECORDS, pyarrow.ipc.new_stream))) == RECORDS

    def test_several_files_one_after_the_other(self, tmp_path: Path) -> None:
        paths = [write_records(tmp_path, name, RECORDS[i : i + 1]) for i, name in enumerate(["b.csv", "a.parquet"])]
        assert fields(paths) == RECORDS
        assert fields(str(tmp_path)) == RECORDS[::-1]

    @pytest.mark.parametrize(
        "content", ['[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}]}', '{"a": 1}\n{"a": 2}\n']
    )
    def test_a_json_document_is_a_list_or_holds_one_or_is_json_lines(self, write: Write, content: str) -> None:
        assert fields(write("a.json", content)) == [{"a": 1}, {"a": 2}]

    def test_blank_lines_are_skipped_but_counted(self, write: Write) -> None:
        assert places(write("a.jsonl", '{"a": 1}\n\n  \n{"a": 2}')) == ["a.jsonl line 1", "a.jsonl line 4"]

    def test_a_csv_record_stands_where_it_begins(self, write: Write) -> None:
        path = write("a.csv", '\ufefftext, label\n\n"one\n\ntwo",1\r\n\nthree,2\n')
        assert places(path) == ["a.csv line 3", "a.csv line 7"]
        assert fields(path)[0] == {"text": "one\n\ntwo", "label": "1"}

    def test_a_unicode_line_separator_inside_a_string_is_no_new_line(self, write: Write) -> None:
        assert fields(write("a.jsonl", '{"a": "x\u2028y"}\n')) == [{"a": "x\u2028y"}]
        assert fields(write("a.csv", "a\nx\u2028y\n")) == [{"a": "x\u2028y"}]

    def test_a_whole_document_in_one_cell(self, write: Write) -> None:
        before = csv.field_size_limit()
        assert before < 200_000
        assert fields(write("a.csv", f"text\n{'x' * 200_000}\n")) == [{"text": "x" * 200_000}]
        assert csv.field_size_limit() == before

    def test_empty_columns_of_a_spreadsheet(self, write: Write) -> None:
        assert fields(write("a.csv", "text,label,,\nx,1,,\n")) == [{"text": "x", "label": "1", "": ""}]

    @pytest.mark.parametrize("delimiter", [";", "|", "\t", "\\t"])
    def test_delimiters(self, write: Write, delimiter: str) -> None:
        sign = "\t" if delimiter == "\\t" else delimiter
        path = write("a.csv", f"text{sign}label\na,b{sign}1\n")
        assert fields(path, delimiter=delimiter) == [{"text": "a,b", "label": "1"}]
        with pytest.raises(ValueError, match=r"^a.csv: the header has one column, .*; set delimiter: "):
            read(path)


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_mark_tells_it(self, write: Write, encoding: str) -> None:
        assert fields(write("a.csv", "text\né\n".encode(encoding))) == [{"text": "é"}]

    @pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "latin-1"])
    def test_others_are_told_by_the_setting(self, write: Write, encoding: str) -> None:
        path = write("a.jsonl", '{"text": "é"}\n'.encode(encoding))
        assert fields(path, encoding=encoding) == [{"text": "é"}]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                b"text\r\nx\r\ncaf\xe9\r\n",
                r"line 3 is not utf-8 text \(byte 12 is 0xe9\); set encoding, such as cp1252",
            ),
            ("text\nx\n".encode("utf-16-le"), "line 1 holds a NUL byte, .* set encoding: utf-16-le"),
            ("text\nx\n".encode("utf-16-be"), "line 1 holds a NUL byte, .* set encoding: utf-16-be"),
            ("text\n日本\n".encode("utf-16-le"), "line 2 is not utf-8 text .* set encoding: utf-16-le"),
            (
                b"text\nx\ny\0y, and so on\n",
                "line 3 holds a NUL byte, .*; set encoding, such as .*, or remove the byte",
            ),
            (b"", "is empty"),
            (b" \n\n", "is empty"),
            (b"\xff\xfe" + b"x\0" * 2 + b"y", "line 1 is not utf-16 text"),
        ],
    )
    @pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.tsv.gz"])
    def test_what_is_no_text_of_it(self, write: Write, name: str, content: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=f"^train: '.*{name}' {message}") as caught:
            read(write(name, content))
        assert "\n" not in str(caught.value)

    def test_what_failed_is_not_recommended(self, write: Write) -> None:
        for encoding, content, advice in (
            ("utf-16", b"text\ncaf\xe9", "such as cp1252$"),
            ("utf-32", b"text", "set encoding: utf-8$"),
            ("cp1252", b"text\n\x81\xff", "such as latin-1$"),
            ("utf-16-le", "text".encode("utf-16-le") + b"x", "it may be damaged"),
        ):
            with pytest.raises(ValueError, match=f" is not {encoding} text .*; .*{advice}"):
                read(write("a.csv", content), encoding=encoding)

    def test_a_text_file_too(self, write: Write) -> None:
        path = write("a.txt", "é".encode("utf-16-le"))
        assert Reader(encoding="utf-16-le").texts(path, "text", "files")[0].documents == ["é"]
        with pytest.raises(ValueError, match=r"^files: '.*a.txt' line 1 is not utf-8 text .* set encoding"):
            Reader().texts(path, "text", "files")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl line 2: not valid JSON .Expecting value at column"),
        ("a.jsonl", '{"a": "x\ty"}', "line 1: not valid JSON .Invalid control character at column 9"),
        ("a.json", '{"a": {"0": 1}, "b": {"0": 2}}', r'an object a line; pandas writes it with .*orient="records"'),
        ("a.json", '{"columns": ["a"], "index": [0], "data": [[1]]}', r'pandas writes it with .*orient="records"'),
        ("a.jsonl", "[1]\n", "a.jsonl line 1: must be a JSON object"),
        ("a.jsonl", '{"a": 1}\n\n{"b": "\\ud800"}', "a.jsonl line 3: field 'b' holds half of a surrogate pair"),
        ("a.jsonl", '{"b": {"c": ["\\uDC00 "]}}', "a.jsonl line 1: field 'b' holds half of a surrogate pair"),
        ("a.jsonl", '{"\\ud800": 1}', "line 1: field .* holds half of a surrogate pair"),
        ("a.jsonl", f'{{"a": 1}}\n{{"a": {DEEP}', "a.jsonl line 2: not valid JSON .nested too deeply"),
        ("a.jsonl", f'{{"a": {"1" * 5000}}}\n', "a.jsonl line 1: not valid JSON .Exceeds the limit"),
        ("a.json", DEEP, "a.json: not valid JSON .nested too deeply"),
        ("a.json", '[\n{"a": 1},\n{"a"}\n]', "a.json line 3: not valid JSON"),
        ("a.json", '[{"a": 1}, 2]', "a.json record 1: must be a JSON object with named fields, not 2"),
        ("a.json", '{"a": 1}', "a.json: must hold a list of JSON objects, an object with one key and such a list, or"),
        ("a.json", '{"a":1}{"a":2}', "a.json line 1: not valid JSON .Extra data"),
        ("a.json", "[]", "train: .*a.json' has no records"),
        ("a.json", '[{"a": "\\ud800"}]', "a.json record 0: field 'a' holds half of a surrogate pair"),
        ("a.csv", "text,label\n", "train: .*a.csv' has no records"),
        ("a.csv", "text,label\nx,1\n\ny\n", "a.csv line 4: the header names 2 columns, this record has 1; set delim"),
        ("a.csv", 'text,label\n"x\n",1,2\n', "a.csv line 2: the header names 2 columns, this record has 3"),
        ("a.csv", 'text\nx\n"y\n\n', r"a.csv line 3: not valid CSV \(unexpected end"),
        ("a.csv", "text,text\nx,1\n", "a.csv: the header names the column 'text' twice"),
        ("a.parquet", b"PAR1 and no more", "train: .*a.parquet' is not a whole parquet file"),
        ("a.arrow", b"ARROW1 and no more", "train: .*a.arrow' is not a whole arrow file"),
        ("a.arrow.gz", b"", "train: .*a.arrow.gz' is not a whole arrow file"),
        ("a.txt", "x", "train: unknown extension of .*a.txt'; known are .jsonl, .ndjson, .json, .csv, .tsv"),
    ],
)
def test_bad_files_get_one_readable_line(write: Write, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(write(name, content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_whole_pair_is_text(write: Write) -> None:
    assert fields(write("a.jsonl", '{"a": "\\ud83d\\ude00"}')) == [{"a": "\U0001f600"}]


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"x" * 1000)[:-12], gzip.compress(b"")[:10] + b"\xff" * 20],
    ids=["other", "cut", "damaged"],
)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "A.CSV.GZ", "a.parquet.gz"])
def test_broken_gzip(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"train: '.*{name}' is not a whole gzip file"):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "utf-9"}, "encoding='utf-9': unknown; give one such as utf-8"),
        ({"encoding": "rot13"}, "encoding='rot13': unknown"),
        ({"delimiter": ", "}, "delimiter=', ': must be one character"),
        ({"delimiter": ""}, "delimiter='': must be one character"),
        ({"delimiter": '"'}, "delimiter='\"': must be one character"),
        ({"on_missing": "drop"}, "on_missing='drop': choose one of error, skip"),
        ({"hub_config": "sst2"}, "hub_config='sst2': it is of a dataset, set hub to its name"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reader(**settings)


def test_texts(write: Write, tmp_path: Path) -> None:
    paths = [
        write("a.txt", "one\n\ntwo\n"),
        write("b.MD.gz", "one"),
        write("c.jsonl", [{"story": "x"}, {"story": "y"}]),
    ]
    paths.append(write_records(tmp_path, "d.parquet", [{"story": "z"}]))
    found = Reader().texts(paths, "story", "files")
    assert [one.path for one in found] == paths
    assert [one.documents for one in found] == [["one\n\ntwo\n"], ["one"], ["x", "y"], ["z"]]
    with pytest.raises(ValueError, match=r"^c.jsonl line 1: no field 'text' \(text_field\); .* on_missing: skip"):
        Reader().texts(paths, "text", "files")


def test_records_without_a_text_can_be_skipped(write: Write) -> None:
    path = write("a.jsonl", [{"text": "x"}, {"text": None}, {"other": 1}, {"text": ""}, {"text": "y"}])
    assert Reader(on_missing="skip").texts(path, "text", "files")[0].documents == ["x", "y"]


class TestDatasets:
    """What `datasets` knows of a set: its splits, and the names of its classes."""

    @pytest.fixture
    def labelled(self) -> Dataset:
        dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]})
        return dataset.cast_column("label", ClassLabel(names=["no", "yes"]))

    def test_class_labels_are_read_by_their_names(self, labelled: Dataset, tmp_path: Path) -> None:
        labelled.save_to_disk(tmp_path / "saved")
        labelled.to_parquet(tmp_path / "a.parquet")
        for path in (tmp_path / "saved", tmp_path / "a.parquet"):
            rows, names = read(str(path))
            assert [row.fields["label"] for row in rows] == ["no", "yes", None]
            assert names == {"label": ["no", "yes"]}

    def test_a_setting_takes_its_own_split(self, labelled: Dataset, tmp_path: Path) -> None:
        path = save_splits(tmp_path / "set", train=labelled, test=labelled.select([1]))
        assert len(read(path, "train").rows) == len(read(path, "files").rows) == 3
        assert len(read(path, "test").rows) == len(read(path, "test_files").rows) == 1
        assert len(read(f"{path}/test", "train").rows) == 1
        with pytest.raises(ValueError, match=r"validation='.*set' has no split 'validation'; name .* one: train, test"):
            read(path, "validation")

    def test_the_name_of_such_a_folder_as_a_hub(self, labelled: Dataset, tmp_path: Path) -> None:
        path = save_splits(tmp_path / "set", train=labelled)
        assert fields("train", hub=path)[0] == {"text": "a", "label": "no"}

    def test_a_damaged_one(self, labelled: Dataset, tmp_path: Path) -> None:
        labelled.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
        with pytest.raises(ValueError, match=r"train='.*saved' is not a whole data set of save_to_disk") as caught:
            read(str(tmp_path / "saved"))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("saved", "datasets")])
    def test_without_the_library_the_extra_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
    ) -> None:
        path = write_records(tmp_path, name, RECORDS)
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(
            ImportError, match=rf"train='.*{name}' needs the {library} library: .*hosfl_lightning\[hub\]"
        ):
            read(path)


class FakeDataset(list):
    features = {"label": SimpleNamespace(names=["no", "yes"]), "text": SimpleNamespace()}


class TestHub:
    def test_calls_load_dataset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def load_dataset(name: str, config: str | None, *, split: str) -> FakeDataset:
            calls.append((name, config, split))
            return FakeDataset([{"text": "a", "label": 1}, {"text": "b", "label": -1}])

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        rows, names = read(["train", "extra"], hub="nyu/glue", hub_config="sst2")
        assert calls == [("nyu/glue", "sst2", "train"), ("nyu/glue", "sst2", "extra")]
        assert [row.fields for row in rows[:2]] == [{"text": "a", "label": "yes"}, {"text": "b", "label": None}]
        assert rows[1].where == "nyu/glue train record 1"
        assert names == {"label": ["no", "yes"]}

    def test_errors_are_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*args: Any, **kwargs: Any) -> None:
            raise FileNotFoundError("no such dataset\nsecond line")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(ValueError, match=r"^hub='x', hub_config=None, split 'train': no such dataset$"):
            read("train", hub="x")

    def test_a_split_must_have_records(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, split: FakeDataset()))
        with pytest.raises(ValueError, match=r"^hub='x': split 'train' has no records$"):
            read("train", hub="x")

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"hub='x' needs .* pip install 'hosfl_lightning\[hub\]'"):
            read("train", hub="x")

    def test_with_the_real_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        write_records(tmp_path, "set/train.jsonl", RECORDS)
        rows, names = read("train", hub=str(tmp_path / "set"))
        assert [row.fields for row in rows] == RECORDS
        assert names == {}
        with pytest.raises(ValueError, match="split 'test'"):
            read("test", hub=str(tmp_path / "set"))


class TestEmptyFiles:
    FILES = ("a.jsonl", "b.csv", "c.json", "d.parquet", "e.txt")
    CONTENT = ('{"text": "x"}\n', "text,label\n", " ", b"", "")

    @pytest.fixture
    def folder(self, write: Write) -> str:
        paths = [write(f"set/{name}", content) for name, content in zip(self.FILES, self.CONTENT)]
        return str(Path(paths[0]).parent)

    def test_can_be_skipped_and_are_counted(self, folder: str, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            assert fields(folder, on_missing="skip") == [{"text": "x"}]
            texts = Reader(on_missing="skip").texts(folder, "text", "files")
        assert [Path(one.path).name for one in texts] == ["a.jsonl"]
        skipped = "files are skipped, the first: "
        assert [message.split(skipped)[0] for message in caplog.messages] == ["train: 3 of 4 ", "files: 4 of 5 "]
        assert caplog.messages[0].endswith("b.csv' has no records")

    def test_else_it_is_said_what_to_do(self, folder: str) -> None:
        with pytest.raises(ValueError, match=r"^train: .*b.csv' has no records; remove it, or .* on_missing: skip$"):
            read(folder)

    def test_not_all_may_be_empty(self, folder: str) -> None:
        with pytest.raises(ValueError, match=r"^train: all 3 files are empty, the first: train: .*b.csv' has no"):
            read([f"{folder}/{name}" for name in self.FILES[1:4]], on_missing="skip")
        with pytest.raises(ValueError, match=r"^files: .*e.txt' is empty$"):
            Reader(on_missing="skip").texts(f"{folder}/e.txt", "text", "files")
