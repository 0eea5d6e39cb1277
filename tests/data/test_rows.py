from __future__ import annotations

import logging

import pytest

from hosfl_lightning.data.rows import MissingError, Row, complete

LACKING = {
    "no field 'text' [(]text_field[)]; the fields here are: label, id$": {},
    "field 'text' [(]text_field[)] is null": {"text": None},
    "field 'text' [(]text_field[)] is NaN": {"text": float("nan")},
    "field 'text' [(]text_field[)] is empty": {"text": " \n"},
}


@pytest.mark.parametrize("message", LACKING)
def test_absent_null_nan_and_empty_are_told_apart(message: str) -> None:
    row = Row("a.jsonl line 3", {**LACKING[message], "label": None, "id": 4})
    for ask in (row.field, row.text):
        with pytest.raises(MissingError, match=f"^a.jsonl line 3: {message}"):
            ask("text", "text_field")


def test_a_text_is_a_text() -> None:
    row = Row("a.jsonl line 3", {"id": 4, "long": ["x" * 1000]})
    assert row.field("id", "field") == 4
    with pytest.raises(ValueError, match=r"line 3: field 'id' \(text_field\) must be a text, not 4$"):
        row.text("id", "text_field")
    with pytest.raises(ValueError, match=r"must be a text, not .{60}[.]{3}$"):
        row.text("long", "text_field")


ROWS = [Row(f"a.csv line {n}", {"text": text}) for n, text in enumerate(["x", "", "y", None], start=2)]


def needs(row: Row) -> None:
    row.text("text", "text_field")


def test_the_first_record_that_lacks_something_is_refused() -> None:
    with pytest.raises(MissingError, match=r"^a.csv line 3: .* is empty; on_missing: skip leaves such records out$"):
        complete(ROWS, needs, "error", "train")


def test_or_such_records_are_left_out_and_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert complete(ROWS, needs, "skip", "train") == [ROWS[0], ROWS[2]]
    assert [record.getMessage() for record in caplog.records] == [
        "train: 2 of 4 records are skipped, the first: a.csv line 3: field 'text' (text_field) is empty"
    ]


def test_nothing_is_said_where_nothing_lacks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        complete(ROWS[:1], needs, "skip", "train")
    assert caplog.records == []


def test_not_all_may_lack_it() -> None:
    with pytest.raises(MissingError, match=r"train: all 2 records lack what is asked of them, the first: a.csv line 3"):
        complete(ROWS[1::2], needs, "skip", "train")


def test_a_value_of_another_type_is_no_lack() -> None:
    with pytest.raises(ValueError, match="must be a text, not 4"):
        complete([Row("a.jsonl line 1", {"text": 4})], needs, "skip", "train")
