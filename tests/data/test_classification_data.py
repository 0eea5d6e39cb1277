from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import ClassificationData, DocstringData, Example, FederatedDataModule, TextData
from tests.data.formats import FORMATS, save_splits, write_records

Write = Callable[[str, Any], str]
RECORDS = [{"text": f"text {i:02d}", "label": i % 3, "user": "uvw"[i % 3 and 1]} for i in range(40)]


def make(tokenizer: PreTrainedTokenizerBase, train: str | list[str], **settings: Any) -> ClassificationData:
    data = ClassificationData(train, **{"tokenizer": tokenizer, "num_clients": 4, **settings})
    data.setup("fit")
    return data


def pairs(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    return [(tokenizer.decode(ids), label) for ids, label in examples]


EXPECTED = [(record["text"], record["label"]) for record in RECORDS]


@pytest.mark.parametrize(
    "settings", [{}, {"partition": "dirichlet", "alpha": 5.0}, {"partition": "field", "field": "user"}]
)
def test_every_example_is_in_one_client_or_held_out(
    write: Write, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> None:
    if "field" in settings:
        settings = {**settings, "num_clients": None}
    data = make(tokenizer, write("a.jsonl", RECORDS), **settings)
    held_out = pairs(data.validation_set, tokenizer)
    dealt = [pair for client in data.clients for pair in pairs(client, tokenizer)]
    assert len(held_out) == 4
    assert sorted(dealt + held_out) == sorted(EXPECTED)


def test_classes_and_batches(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer, write("a.jsonl", RECORDS), max_length=6)
    assert data.label_set.count == 3
    batch = data.client_batch(2, 1)
    assert batch["labels"].shape == (4,)
    assert batch["labels"].dtype == torch.int64
    known = {(text[:6], label) for text, label in EXPECTED}
    assert all((tokenizer.decode(ids), int(label)) in known for ids, label in zip(batch["input_ids"], batch["labels"]))


def test_a_client_per_value_of_a_field(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer, write("a.jsonl", RECORDS), partition="field", field="user", num_clients=None)
    assert data.client_names == ["u", "v"]
    assert {label for _, label in pairs(data.clients[0], tokenizer)} == {0}
    assert {label for _, label in pairs(data.clients[1], tokenizer)} == {1, 2}


def test_dirichlet_skews_the_labels(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"text": f"t{i}", "label": i % 4} for i in range(400)]
    data = make(tokenizer, write("a.jsonl", records), partition="dirichlet", alpha=0.1, num_clients=3)
    counts = [torch.tensor([e.labels for e in client]).bincount(minlength=4) for client in data.clients]
    assert max(int(count.max()) / int(count.sum()) for count in counts) > 0.5


def test_the_held_out_examples_are_the_same_for_every_seed(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", RECORDS)
    a, b = (make(tokenizer, path, seed=seed) for seed in (0, 1))
    assert pairs(a.validation_set, tokenizer) == pairs(b.validation_set, tokenizer)
    assert pairs(a.clients[0], tokenizer) != pairs(b.clients[0], tokenizer)


def test_limits_choose_from_all_over_the_file(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", RECORDS)
    limits = {"max_train_examples": 12, "max_validation_examples": 5, "max_test_examples": 3}
    data = make(tokenizer, path, validation=path, test=path, **limits)
    train = [pair for client in data.clients for pair in pairs(client, tokenizer)]
    assert [len(train), len(data.validation_set), len(data.test_set)] == [12, 5, 3]
    assert max(train) > ("text 30", 0)
    assert len(make(tokenizer, path, validation_fraction=0.5, max_validation_examples=5).validation_set) == 5


def test_csv_with_names(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = "".join(f"text {i},{'yes' if i % 2 else 'no'}\n" for i in range(8))
    train = write("a.csv", "review,mood\n" + lines)
    settings = {"text_field": "review", "label_field": "mood", "validation": train}
    data = make(tokenizer, train, **settings)
    assert data.label_set.names == ["no", "yes"]
    assert pairs(data.validation_set, tokenizer) == [(f"text {i}", i % 2) for i in range(8)]
    reverse = make(tokenizer, train, labels=write("labels.json", '["yes", "no"]'), **settings)
    assert pairs(reverse.validation_set, tokenizer) == [(f"text {i}", 1 - i % 2) for i in range(8)]


def test_the_prompt_route_labels_the_word_only(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"text": f"film {i}", "label": i % 2} for i in range(12)]
    words = [" terrible", " great"]
    data = make(tokenizer, write("a.jsonl", records), prompt="{text} It was", label_words=words, num_clients=2)
    batch = data.client_batch(0, 0)
    assert batch["labels"].shape == batch["input_ids"].shape
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        text = tokenizer.decode(ids[mask.bool()])
        word = tokenizer.decode(labels[labels != -100])
        number = int(text.split()[1])
        assert text == f"film {number} It was{words[number % 2]}"
        assert word == words[number % 2]
        assert torch.equal(ids[labels != -100], labels[labels != -100])


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([*RECORDS[:2], {"text": "x", "label": 5}], {"num_labels": 3}, "a.jsonl line 3: label 5 is out of range.*0..2"),
        ([*RECORDS[:2], {"text": "x", "label": -1}], {}, "a.jsonl line 3: label -1 is the smallest, .* for labels$"),
        (
            [{"text": "x", "label": i % 3 + 1} for i in range(9)],
            {},
            "line 1: label 1 is the smallest, .* classes count from 0; list .* for labels, or set num_labels: 4 if",
        ),
        (
            [{"body": "x", "label": 0}] * 9,
            {},
            r"line \d: no field 'text' \(text_field\); the fields here are: body, label",
        ),
        ([{"text": "x", "class": 0}] * 9, {}, r"line 1: no field 'label' \(label_field\)"),
        (
            [*RECORDS, {"text": " ", "label": 0}],
            {"validation_fraction": 0.01},
            r"line 41: field 'text' \(text_field\) is empty; on_missing: skip",
        ),
        (RECORDS, {"num_clients": 50}, "num_clients=50 is more than the 36 examples"),
        (
            RECORDS,
            {"num_clients": 9, "partition": "dirichlet", "min_examples_per_client": 5},
            "min_examples_per_client=5: 9 clients need 45 examples, and there are 36; lower it to 4",
        ),
        (RECORDS, {"partition": "field", "field": "place"}, r"no field 'place' \(field\)"),
        (
            RECORDS,
            {"partition": "field", "field": "user"},
            "num_clients=4: ByField makes 2 clients; set it to",
        ),
        (RECORDS[:1], {"num_clients": 1}, "train: one example only"),
    ],
)
def test_bad_data(
    write: Write, tokenizer: PreTrainedTokenizerBase, records: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer, write("a.jsonl", records), **settings)


def test_a_name_that_the_training_set_lacks(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    train = write("a.jsonl", [{"text": "x", "label": "ny"[i % 2]} for i in range(8)])
    other = write("v.csv", "text,label\nx,n\n\nx,maybe\n")
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=r"^v.csv line 4: label 'maybe' is neither .*; the names are n, y$"):
            make(tokenizer, train, **{split: other})


STARS = [{"text": f"text {i:02d}", "label": i % 3 + 1} for i in range(12)]


@pytest.mark.parametrize("named", [True, False], ids=["names", "indices"])
@pytest.mark.parametrize("name", [*(f"a{suffix}" for suffix in FORMATS), "saved"])
def test_digits_are_the_same_labels_in_every_file(
    write: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, named: bool
) -> None:
    path = write_records(tmp_path / "data", name, STARS)
    settings: dict[str, Any] = {"labels": write("labels.txt", "1\n2\n3\n")} if named else {"num_labels": 4}
    data = make(tokenizer, path, validation=path, num_clients=1, **settings)
    assert pairs(data.validation_set, tokenizer) == [(f"text {i:02d}", i % 3 + (not named)) for i in range(12)]
    assert data.label_names == (["1", "2", "3"] if named else None)


def test_numbers_and_words_are_names_in_every_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    mixed = [{"text": "x", "label": label} for label in ("1", "none", "10", "2") * 2]
    found = [make(tokenizer, write_records(tmp_path, f"a{suffix}", mixed)).label_names for suffix in FORMATS]
    found.append(make(tokenizer, write_records(tmp_path, "b.jsonl", [*mixed, {"text": "x", "label": 2}])).label_names)
    assert found == [["1", "10", "2", "none"]] * len(found)


def test_names_are_those_of_all_training_records(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Also of those that `max_train_examples` leaves out."""
    path = write("a.jsonl", [{"text": "x", "label": f"n{i}"} for i in range(9)])
    data = make(tokenizer, path, validation=path, max_train_examples=4)
    assert data.label_names == [f"n{i}" for i in range(9)]
    assert len(data.validation_set) == 9


def test_records_that_lack_something_can_be_skipped(
    write: Write, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = [{"text": None, "label": 0}, {"text": "", "label": 0}, {"text": "x", "label": None}, {"label": 1}, {}]
    path = write("a.jsonl", [*lacking, *RECORDS, {"text": "x", "label": float("nan")}])
    with caplog.at_level(logging.INFO):
        data = make(tokenizer, path, validation=write("v.jsonl", RECORDS), on_missing="skip")
    assert sum(map(len, data.clients)) == len(RECORDS)
    assert [one for one in caplog.messages if "skipped" in one] == [
        "train: 6 of 46 records are skipped, the first: a.jsonl line 1: field 'text' (text_field) is null"
    ]
    by_field = {"partition": "field", "field": "user", "num_clients": None, "on_missing": "skip"}
    data = make(tokenizer, write("b.jsonl", [*RECORDS, {"text": "x", "label": 0, "user": None}]), **by_field)
    assert data.client_names == ["u", "v"]


def test_folders_globs_and_lists(write: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    parts = [write_records(tmp_path / "set", name, RECORDS[i::2]) for i, name in enumerate(["a.csv.gz", "b.parquet"])]
    write("set/README.md", "of this set")
    for source in (parts, str(tmp_path / "set"), str(tmp_path / "set" / "*"), [parts[0], str(tmp_path / "set" / "b*")]):
        data = make(tokenizer, source, validation=source)
        assert sorted(pairs(data.validation_set, tokenizer)) == sorted(EXPECTED)


def test_a_data_set_that_knows_its_names(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, write: Write) -> None:
    dataset = Dataset.from_list(RECORDS).cast_column("label", ClassLabel(names=["3", "2", "1"]))
    path = save_splits(tmp_path / "set", train=dataset, validation=dataset.select(range(5)))
    for data in (make(tokenizer, path, validation=path), make(tokenizer, "train", validation="validation", hub=path)):
        assert data.label_names == ["3", "2", "1"]
        assert pairs(data.validation_set, tokenizer) == EXPECTED[:5]
    data = make(tokenizer, path, validation=path, labels=write("labels.txt", "1\n2\n3\n"))
    assert pairs(data.validation_set, tokenizer) == [(text, 2 - label) for text, label in EXPECTED[:5]]


def test_words_of_a_prompt_are_never_matched_to_names_by_guessing(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write("a.jsonl", [{"text": "x", "label": "no"}, {"text": "x", "label": "yes"}])
    with pytest.raises(ValueError, match=r"a.jsonl line 1: label 'no' is neither .*; there are no names, set labels"):
        make(tokenizer, path, validation=path, prompt="{text}:", label_words=[" a", " b"])


@pytest.mark.parametrize("written", [int, str])
def test_label_words_count_from_0_as_all_classes_do(
    write: Write, tokenizer: PreTrainedTokenizerBase, written: Callable[[int], Any]
) -> None:
    """Trained by one off, 1 would be the second word and 2 out of range."""
    stars = write("a.jsonl", [{"text": f"film {i}", "label": written(i % 2 + 1)} for i in range(12)])
    ask: dict[str, Any] = {"prompt": "{text}:", "num_clients": 1, "validation": stars}
    with pytest.raises(ValueError, match=r"a.jsonl line 1: label 1 is the smallest, .* a file for labels$"):
        make(tokenizer, stars, **ask, label_words=[" a", " b"])
    with pytest.raises(ValueError, match=r"label 1 is the smallest, .* for labels, or set num_labels: 3 if class 0"):
        make(tokenizer, stars, **ask, label_words=[" none", " a", " b"])
    for settings in (
        {"labels": write("labels.txt", "1\n2"), "label_words": [" a", " b"]},
        {"num_labels": 3, "label_words": [" none", " a", " b"]},
    ):
        data = make(tokenizer, stars, **ask, **settings)
        assert [tokenizer.decode(e.input_ids) for e in data.validation_set[:2]] == ["film 0: a", "film 1: b"]


def test_the_first_bad_label_in_the_file_is_reported(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", [{"text": "x", "label": min(i, 9)} for i in range(40)])
    with pytest.raises(
        ValueError, match=r"a.jsonl line 3: label 2 is out of range.*counting starts at 0; .* for labels"
    ):
        make(tokenizer, path, prompt="{text}:", label_words=[" a", " b"])


def test_num_labels_and_names_that_differ(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", [{"text": "x", "label": "no"}, {"text": "x", "label": "yes"}])
    with pytest.raises(ValueError, match="num_labels: 3 classes, but there are 2"):
        make(tokenizer, path, validation=path, num_labels=3)


def test_a_label_out_of_range_in_the_validation_file(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    other = write("v.jsonl", [{"text": "x", "label": 9}])
    with pytest.raises(ValueError, match=r"v.jsonl line 1: label 9 is out of range, the 3 classes are 0..2"):
        make(tokenizer, write("a.jsonl", RECORDS), validation=other)


def test_numbers_of_classes_that_disagree(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    names = write("labels.json", '["a", "b", "c"]')
    path = write("a.jsonl", RECORDS)
    with pytest.raises(ValueError, match="num_labels: 4 classes, but there are 3"):
        make(tokenizer, path, labels=names, num_labels=4)
    with pytest.raises(ValueError, match="label_words: 2 classes, but there are 3"):
        make(tokenizer, path, labels=names, prompt="{text}:", label_words=[" a", " b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_clients: partition=iid needs"),
        ({"partition": "field"}, "field: partition=field needs"),
        ({"num_clients": 2, "prompt": "{text}"}, "prompt and label_words go together"),
        ({"num_clients": 2, "label_words": ["a"]}, "prompt and label_words go together"),
        ({"num_clients": 2, "partition": "skewed"}, "partition='skewed': choose one of iid, dirichlet, field"),
        ({"num_clients": 2, "max_length": 0}, "max_length=0: must be at least 1"),
        ({"num_clients": 2, "validation_fraction": 0.0}, "validation_fraction=0.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationData("a.jsonl", **settings)


def test_hub_splits_and_names(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    class FakeDataset(list):
        features = {"label": SimpleNamespace(names=["no", "maybe", "yes"])}

    splits = {"train": FakeDataset(RECORDS), "dev": FakeDataset(RECORDS[:5])}
    module = SimpleNamespace(load_dataset=lambda name, config, split: splits[split])
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = make(tokenizer, "train", validation="dev", hub="some/set")
    assert data.label_set.names == ["no", "maybe", "yes"]
    assert pairs(data.validation_set, tokenizer) == EXPECTED[:5]
    assert sum(map(len, data.clients)) == 40


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (DocstringData, ["--data.packages=[numpy, torch]", "--data.sequence_length=16"]),
        (TextData, ["--data.files=[a.txt]", "--data.partition=by_file"]),
        (TextData, ["--data.files=notes/*.txt", "--data.partition=by_file", "--data.on_missing=skip"]),
        (
            ClassificationData,
            ["--data.train=a.csv", "--data.num_clients=3", "--data.label_words=[' a', ' b']", "--data.prompt={text}:"],
        ),
    ],
)
def test_a_recipe_can_name_them(kind: type[FederatedDataModule], arguments: list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FederatedDataModule, "data")
    config = parser.parse_args(
        [f"--data=hosfl_lightning.data.{kind.__name__}", *arguments, "--data.tokenizer=some/name"]
    )
    data = parser.instantiate(config).data
    assert type(data) is kind
    assert data.tokenizer == "some/name"


@pytest.mark.parametrize("name", ["banking77", "mr_polarity", "subj", "snips"])
def test_real_sets(real_data: Callable[[str], Path], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    folder = real_data(name)
    files = {split: str(folder / f"{split}.jsonl.gz") for split in ("train", "test")}
    data = make(
        tokenizer,
        files["train"],
        validation=files["test"],
        labels=str(folder / "labels.json"),
        num_clients=10,
        partition="dirichlet",
        alpha=1.0,
        max_train_examples=500,
        max_validation_examples=100,
    )
    assert sum(map(len, data.clients)) == 500
    assert {int(example.labels) for example in data.validation_set} <= set(range(data.label_set.count))
