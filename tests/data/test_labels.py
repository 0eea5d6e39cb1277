from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.data.labels import LabelSet, infer_labels, label_text, read_label_names, write_label_names
from hosfl_lightning.data.rows import Row

Write = Callable[[str, Any], str]


def row(label: Any) -> Row:
    return Row("a.csv line 5", {"label": label})


@pytest.mark.parametrize(("label", "index"), [(0, 0), (2, 2), ("1", 1), (" 2 ", 2)])
def test_integers(label: Any, index: int) -> None:
    assert LabelSet(3).index(row(label), "label") == index


@pytest.mark.parametrize("value", [2, 2.0, "2", " 2 ", "2.0", "02", "+2"])
def test_a_whole_number_is_one_label_however_it_is_written(value: Any) -> None:
    assert label_text(value) == "2"
    assert LabelSet(3).index(row(value), "label") == 2
    assert LabelSet(3, ["1", "2", "3"]).index(row(value), "label") == 1
    assert LabelSet(3, ["no", "maybe", "yes"]).index(row(value), "label") == 2


def test_where_a_name_is_a_number_every_label_is_a_name() -> None:
    for value in (0, "0", 4):
        with pytest.raises(ValueError, match=r"a.csv line 5: label '?\d'? is not a known name; the names are 1, 2, 3"):
            LabelSet(3, ["1", "2", "3"]).index(row(value), "label")


def test_a_name_is_found_whatever_space_is_around_it() -> None:
    assert LabelSet(2, ["no", "yes "]).index(row(" yes"), "label") == 1


@pytest.mark.parametrize("label", [3, -1, "3"])
def test_out_of_range_has_the_line_and_the_range(label: Any) -> None:
    with pytest.raises(ValueError, match=r"a.csv line 5: label -?\d is out of range, the 3 classes are 0..2"):
        LabelSet(3).index(row(label), "label")


@pytest.mark.parametrize("label", ["maybe", 1.5, "1.5", [1], {}])
def test_unknown_labels(label: Any) -> None:
    with pytest.raises(ValueError, match=r"a.csv line 5: label .* is neither .* the names are no, yes$"):
        LabelSet(2, ["no", "yes"]).index(row(label), "label")
    with pytest.raises(ValueError, match="there are no names, set labels"):
        LabelSet(2).index(row(label), "label")


def test_a_missing_label() -> None:
    with pytest.raises(ValueError, match=r"a.csv line 5: field 'label' \(label_field\) is null"):
        LabelSet(2).index(row(None), "label")


def test_inference() -> None:
    assert infer_labels([row(0), row("4")], "label") == LabelSet(5)
    assert infer_labels([row("b"), row("a"), row("b")], "label") == LabelSet(2, ["a", "b"])
    assert infer_labels([row("b"), row("1")], "label") == LabelSet(2, ["1", "b"])
    assert infer_labels([row("b"), row(1), row("1.0")], "label") == LabelSet(2, ["1", "b"])
    with pytest.raises(ValueError, match=r"a.csv line 5: label True is neither an integer nor a name; write 0, 1"):
        infer_labels([row(0), row(True)], "label")


@pytest.mark.parametrize("values", [(False, True), ("False", "True"), ("false", " TRUE")])
def test_false_and_true_are_the_same_names_in_every_file(values: tuple[Any, Any]) -> None:
    assert infer_labels([row(values[1]), row(values[0])], "label") == LabelSet(2, ["false", "true"])
    assert [LabelSet(2).index(row(value), "label") for value in values] == [0, 1]
    assert [LabelSet(2, ["True", "False"]).index(row(value), "label") for value in values] == [1, 0]


@pytest.mark.parametrize("value", [1.5, "1.5", "0.5e-1", ".5"])
def test_a_number_that_is_no_whole_one_is_a_class_only_where_it_is_listed(value: Any) -> None:
    with pytest.raises(ValueError, match=r"a.csv line 5: label .* is no whole number; .* or list .* for labels$"):
        infer_labels([row("0"), row(value), row("1")], "label")
    assert LabelSet(2, ["0", str(value)]).index(row(value), "label") == 1
    assert label_text(1e3) == label_text("1e3") == "1000"


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("labels.json", '["no", "yes"]', ["no", "yes"]),
        ("labels.json", "[1, 2, 3]", ["1", "2", "3"]),
        ("labels.json", '{"id2label": {"1": "yes", "0": "no"}, "num_labels": 2}', ["no", "yes"]),
        ("labels.txt", "\ufeffno\r\n\n yes \n", ["no", "yes"]),
        ("labels", "no\nyes", ["no", "yes"]),
    ],
)
def test_a_file_of_names(write: Write, name: str, content: str, names: list[str]) -> None:
    assert read_label_names(write(name, content)) == names


def test_what_is_written_is_read(write: Write) -> None:
    names = ["ja", "nö", '"3"', "1"]
    assert read_label_names(write("labels.json", write_label_names(names))) == names


@pytest.mark.parametrize(
    "content", ["{}", "[1, 1.0]", '["a", "a"]', "[]", "3", '["a", null]', '["a", ""]', '{"id2label": {"1": "a"}}']
)
def test_a_file_of_something_else(write: Write, content: str) -> None:
    with pytest.raises(ValueError, match=r"labels: .*labels.json' must hold distinct class names"):
        read_label_names(write("labels.json", content))


def test_other_bad_files_of_names(write: Write, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="labels: there is no file"):
        read_label_names(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"labels: .*labels.txt' must hold distinct class names"):
        read_label_names(write("labels.txt", "a\nb\na\n"))
    for content in ("no, yes", "[" * 100_000):
        with pytest.raises(ValueError, match=r"labels: .* is not valid JSON"):
            read_label_names(write("labels.json", content))
