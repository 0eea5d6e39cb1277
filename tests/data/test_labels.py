from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.data.labels import LabelSet, infer_labels, read_label_names
from hosfl_lightning.data.readers import Row

Write = Callable[[str, Any], str]


def row(label: Any) -> Row:
    return Row("a.csv line 5", {"label": label})


@pytest.mark.parametrize(("label", "index"), [(0, 0), (2, 2), ("1", 1), (" 2 ", 2)])
def test_integers(label: Any, index: int) -> None:
    assert LabelSet(3).index(row(label), "label") == index


@pytest.mark.parametrize(("label", "index"), [("no", 0), ("2", 1), (2, 2), ("0", 0)])
def test_a_name_goes_before_the_integer_it_spells(label: Any, index: int) -> None:
    assert LabelSet(3, ["no", "2", "yes"]).index(row(label), "label") == index


@pytest.mark.parametrize("label", [3, -1, "3"])
def test_out_of_range_has_the_line_and_the_range(label: Any) -> None:
    with pytest.raises(ValueError, match=r"a.csv line 5: label -?\d is out of range, the 3 classes are 0..2"):
        LabelSet(3).index(row(label), "label")


@pytest.mark.parametrize("label", ["maybe", 1.0, True, [1], {}])
def test_unknown_labels(label: Any) -> None:
    with pytest.raises(ValueError, match=r"a.csv line 5: label .* is neither .* the names are no, yes$"):
        LabelSet(2, ["no", "yes"]).index(row(label), "label")
    with pytest.raises(ValueError, match="there are no names, set labels"):
        LabelSet(2).index(row(label), "label")


def test_a_missing_label() -> None:
    with pytest.raises(ValueError, match=r"no field 'label' \(label_field\)"):
        LabelSet(2).index(row(None), "label")


def test_inference() -> None:
    assert infer_labels([row(0), row("4")], "label") == LabelSet(5)
    assert infer_labels([row("b"), row("a"), row("b")], "label") == LabelSet(2, ["a", "b"])
    assert infer_labels([row("b"), row("1")], "label") == LabelSet(2, ["1", "b"])
    with pytest.raises(ValueError, match="label 1 is not a name"):
        infer_labels([row("b"), row(1)], "label")


def test_a_file_of_names(write: Write, tmp_path: Path) -> None:
    assert read_label_names(write("labels.json", '["no", "yes"]')) == ["no", "yes"]
    with pytest.raises(FileNotFoundError, match="labels: there is no file"):
        read_label_names(str(tmp_path / "none.json"))
    for content in ("{}", "[1, 2]", '["a", "a"]'):
        with pytest.raises(ValueError, match=r"labels: .* must hold a JSON list of distinct class names"):
            read_label_names(write("labels.json", content))
    with pytest.raises(ValueError, match=r"labels: .* is not valid JSON"):
        read_label_names(write("labels.json", "no, yes"))
