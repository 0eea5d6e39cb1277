from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import Example, TextData
from tests.data.formats import save_splits

Write = Callable[[str, Any], str]
TEXT = "".join(f"{i:03d}-" for i in range(100))  # block i of 4 tokens reads "i-"


def make(tokenizer: PreTrainedTokenizerBase, files: str | list[str], **settings: Any) -> TextData:
    data = TextData(files, **{"tokenizer": tokenizer, "sequence_length": 4, "batch_size": 2, **settings})
    data.setup("fit")
    return data


def texts(blocks: list[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(block.input_ids) for block in blocks]


def test_the_last_tenth_is_held_out_and_the_rest_dealt_once(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    data = make(tokenizer, [write("a.txt", TEXT)], num_clients=7)
    assert texts(data.validation_set, tokenizer) == [f"{i:03d}-" for i in range(90, 100)]
    dealt = [text for client in data.clients for text in texts(client, tokenizer)]
    assert sorted(dealt) == [f"{i:03d}-" for i in range(90)]
    assert [len(client) for client in data.clients] == [13, 13, 13, 13, 13, 13, 12]
    assert texts(data.clients[0], tokenizer) != [f"{i:03d}-" for i in range(13)]
    assert data.test_set == []


def test_the_seed_changes_who_holds_what_but_not_the_validation_set(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write("a.txt", TEXT)
    a, b = (make(tokenizer, [path], num_clients=3, seed=seed, max_validation_examples=4) for seed in (0, 1))
    assert texts(a.clients[0], tokenizer) != texts(b.clients[0], tokenizer)
    assert texts(a.validation_set, tokenizer) == texts(b.validation_set, tokenizer)
    assert len(a.validation_set) == 4


def test_by_file(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    files = [write("ann.txt", "a" * 40), write("bob.txt.gz", "b" * 80)]
    data = make(tokenizer, files, partition="by_file", validation_fraction=0.25)
    assert data.client_names == ["ann", "bob"]
    assert [texts(client, tokenizer) for client in data.clients] == [["aaaa"] * 8, ["bbbb"] * 15]
    assert texts(data.validation_set, tokenizer) == ["aaaa"] * 2 + ["bbbb"] * 5


def test_files_of_one_name_are_told_apart_by_folder(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "x").mkdir()
    files = [write("a.txt", "a" * 40), write("x/a.txt", "b" * 40)]
    assert make(tokenizer, files, partition="by_file").client_names == [f"{tmp_path.name}/a", "x/a"]


def test_validation_and_test_files(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    others = {"validation_files": [write("v.txt", "vvvvv")], "test_files": [write("t.txt", "tttt" * 2)]}
    data = make(tokenizer, [write("a.txt", "a" * 40)], num_clients=2, **others)
    assert sum(map(len, data.clients)) == 10
    assert texts(data.validation_set, tokenizer) == ["vvvv"]
    assert texts(data.test_set, tokenizer) == ["tttt", "tttt"]


def test_the_test_set_is_the_end_of_each_file_and_validation_lies_before_it(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    files = [write("a.txt", TEXT), write("b.txt", "b" * 40)]
    data = make(tokenizer, files, num_clients=3, validation_fraction=0.1, test_fraction=0.2)
    assert texts(data.test_set, tokenizer) == [f"{i:03d}-" for i in range(80, 100)] + ["bbbb"] * 2
    assert texts(data.validation_set, tokenizer) == [f"{i:03d}-" for i in range(70, 80)] + ["bbbb"]
    dealt = [text for client in data.clients for text in texts(client, tokenizer)]
    assert sorted(dealt) == [f"{i:03d}-" for i in range(70)] + ["bbbb"] * 7


def test_a_test_share_beside_validation_files_is_all_that_is_held_out(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    files, others = [write("a.txt", TEXT)], [write("v.txt", "vvvv")]
    data = make(tokenizer, files, num_clients=1, validation_files=others, test_fraction=0.1, max_test_examples=3)
    assert texts(data.validation_set, tokenizer) == ["vvvv"]
    assert len(data.clients[0]) == 90
    assert len(data.test_set) == 3
    assert set(texts(data.test_set, tokenizer)) <= {f"{i:03d}-" for i in range(90, 100)}
    again = make(tokenizer, files, num_clients=1, test_fraction=0.1, max_test_examples=3, seed=5)
    assert texts(again.test_set, tokenizer) == texts(data.test_set, tokenizer)


def test_records_are_documents_joined_by_eos(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    records = [{"story": "aaa"}, {"story": "bbb"}, {"story": "ccccccc"}]
    data = make(tokenizer, [write("a.jsonl.gz", records)], num_clients=1, text_field="story")
    blocks = texts(data.clients[0] + data.validation_set, tokenizer)
    assert blocks == ["aaa<eos>", "bbb<eos>", "cccc"]


def test_a_folder_a_glob_and_splits(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("notes/b.txt", "notes/sub/a.md.gz", "notes/c.csv"):
        write(name, "text\n" + TEXT)
    path = save_splits(
        tmp_path / "set", train=Dataset.from_dict({"text": [TEXT]}), validation=Dataset.from_dict({"text": ["vvvv"]})
    )
    settings = {"partition": "by_file", "test_files": str(tmp_path / "notes" / "*.csv")}
    folder = make(tokenizer, str(tmp_path / "notes"), **settings)
    assert folder.client_names == ["b", "c", "a"]
    assert len(folder.test_set) == 100
    data = make(tokenizer, path, num_clients=2, validation_files=path)
    assert texts(data.validation_set, tokenizer) == ["vvvv"]
    hub = make(tokenizer, "train", num_clients=2, validation_files=["validation"], hub=path)
    assert texts(hub.validation_set, tokenizer) == ["vvvv"]
    assert texts(hub.clients[0], tokenizer) == texts(data.clients[0], tokenizer)


def test_short_files_are_taken_together(
    write: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(10):
        write(f"notes/{i}.txt", "abc")
    write("notes/long.txt", TEXT)
    with caplog.at_level(logging.INFO):
        data = make(tokenizer, str(tmp_path / "notes"), num_clients=1)
    assert "files: 10 of 11 files are short and taken together" in caplog.messages
    together = [f"abc{end}" for end in ["<eos>"] * 9]  # the last has no block of its own
    assert sorted(texts(data.clients[0], tokenizer)) == sorted([f"{i:03d}-" for i in range(90)] + together[:-1])
    assert texts(data.validation_set, tokenizer) == [f"{i:03d}-" for i in range(90, 100)] + together[-1:]
    for source in ("files", "validation_files"):
        small = {"files": str(tmp_path / "notes" / "long.txt"), source: str(tmp_path / "notes" / "[01].txt")}
        with pytest.raises(ValueError, match=f"{source}: '.*0.txt and 1 more' has "):
            make(tokenizer, **small, num_clients=1, sequence_length=40)
    with pytest.raises(ValueError, match=r"files: '.*0.txt' has too few tokens for one block"):
        make(tokenizer, str(tmp_path / "notes"), partition="by_file")


def test_options_of_the_reader(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    table = "id;text\n" + "".join(f"{i};{'é' * 4 if i % 2 else ''}\n" for i in range(12))
    settings = {"encoding": "cp1252", "delimiter": ";", "on_missing": "skip"}
    data = make(tokenizer, write("a.csv", table.encode("cp1252")), num_clients=1, sequence_length=9, **settings)
    assert texts(data.clients[0], tokenizer) == ["éééé<eos>"] * 4
    with pytest.raises(ValueError, match=r"a.csv line 2: field 'text' \(text_field\) is empty; on_missing: skip"):
        make(tokenizer, write("a.csv", table), num_clients=1, delimiter=";")


def test_batches(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = make(tokenizer, [write("a.txt", TEXT)], num_clients=2).client_batch(1, 0)
    assert batch["input_ids"].shape == (2, 4)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["attention_mask"].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": []}, "files: name at least one"),
        ({}, "num_clients: partition=iid needs"),
        ({"num_clients": 2, "partition": "random"}, "partition='random': choose one of iid, by_file"),
        ({"num_clients": 2, "validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"num_clients": 2, "test_fraction": 1.0}, "test_fraction=1.0: must be at least 0 and below 1"),
        ({"num_clients": 2, "max_test_examples": 0}, "max_test_examples=0: must be at least 1"),
        ({"num_clients": 2, "test_fraction": 0.1, "test_files": ["b.txt"]}, "test_fraction=0.1: there are test_files"),
        ({"num_clients": 2, "sequence_length": 1}, "sequence_length=1: must be at least 2"),
        ({"num_clients": 0}, "num_clients=0: must be at least 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextData(**{"files": ["a.txt"], **settings})


def test_bad_files(write: Write, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="files: there is no file"):
        make(tokenizer, [str(tmp_path / "none.txt")], num_clients=1)
    with pytest.raises(
        ValueError, match=r"files: .*a.txt' has too few tokens for one block; lower sequence_length from 4"
    ):
        make(tokenizer, [write("a.txt", "abc")], num_clients=1)
    with pytest.raises(ValueError, match=r"1 block\(s\), and 1 for validation and 0 for testing leave none; lower"):
        make(tokenizer, [write("a.txt", "abcdef")], num_clients=1)
    with pytest.raises(ValueError, match=r"2 block\(s\), and 1 for validation and 1 for testing leave none"):
        make(tokenizer, [write("a.txt", "abcdefgh")], num_clients=1, test_fraction=0.1)
    with pytest.raises(ValueError, match="num_clients=9 is more than the 2 examples"):
        make(tokenizer, [write("a.txt", "abcdefghijkl")], num_clients=9)
    with pytest.raises(ValueError, match="num_clients=2: ByFile makes 1 clients; set it to that or null"):
        make(tokenizer, [write("a.txt", TEXT)], num_clients=2, partition="by_file")
    with pytest.raises(ValueError, match=r"validation_files: .*v.txt' is empty"):
        make(tokenizer, [write("a.txt", TEXT)], num_clients=1, validation_files=[write("v.txt", "")])


def test_real_text(real_data: Callable[[str], Path], tokenizer: PreTrainedTokenizerBase) -> None:
    path = real_data("tinyshakespeare") / "input.txt"
    data = make(tokenizer, [str(path)], num_clients=8, sequence_length=64)
    assert sum(map(len, data.clients)) + len(data.validation_set) == 1_115_394 // 64


def test_real_stories(real_data: Callable[[str], Path], tokenizer: PreTrainedTokenizerBase) -> None:
    path = real_data("tinystories_sample")
    files = [str(path / "train.jsonl.gz")]
    data = make(tokenizer, files, num_clients=4, validation_files=[str(path / "test.jsonl.gz")], sequence_length=64)
    assert data.num_clients == 4
    assert len(data.validation_set) > 1000
