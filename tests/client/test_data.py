"""A device's batches are those of a client in PyTorch with the same file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hosfl_client.apart import read_apart
from hosfl_client.examples import DataError, DataSettings, check_examples, read_examples
from hosfl_client.minibatches import Minibatches
from hosfl_client.text import Text
from hosfl_lightning.clients.cohort import Cohort
from hosfl_lightning.data import ClassificationData, FederatedDataModule, ImageData, ImageExample, TextData
from hosfl_lightning.device.data import data_of

RECORDS = [{"text": f"the {'quick ' * (i % 5)}fox {i}", "label": ["no", "yes"][i % 2]} for i in range(11)]
ROUNDS = range(5)


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    return SimpleNamespace(tokenizer=lambda: tokenizer)


def device(path: Path, section: dict[str, Any], model: Any, folder: Path, **own: Any) -> Minibatches:
    (folder / "tokenizer.json").write_text(model.tokenizer().backend_tokenizer.to_str())
    settings = DataSettings.of(data_of(section, model), **own)
    return Minibatches(read_apart(path, settings, folder / "tokenizer.json"), settings)


def same_batches(there: FederatedDataModule, here: Minibatches, count: Any) -> None:
    there.setup("fit")
    for round in ROUNDS:
        batch = there.client_batch(0, round)
        mine, cohort = here(round), None
        if "attention_mask" in batch:
            cohort = Cohort.join([0], [batch], count)
            batch, n = cohort.batch, cohort.num_terms[0]
            assert mine.num_terms == n
        assert mine.inputs.keys() == batch.keys() - {"labels"}
        for name, array in mine.inputs.items():
            assert torch.equal(torch.from_numpy(array), batch[name]), (round, name)
        assert torch.equal(torch.from_numpy(mine.labels), batch["labels"])


def tokens(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_blocks_of_text(suffix: str, model: Any, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    texts = ["one two three </s> <|eos|> four, five\n" * 9, "six seven " * 20]
    write(path, [{"text": text} for text in texts]) if suffix == ".jsonl" else path.write_text(texts[0])
    (tmp_path / "other.txt").write_text("held out " * 9)
    arguments = {"files": str(path), "num_clients": 1, "batch_size": 3, "sequence_length": 16, "seed": 4}
    there = TextData(**arguments, validation_files=str(tmp_path / "other.txt"), tokenizer=model.tokenizer())
    section = {"class_path": "hosfl_lightning.data.TextData", "init_args": arguments}
    same_batches(there, device(path, section, model, tmp_path), tokens)


@pytest.mark.parametrize("kind", ["labelled", "prompted", "csv"])
def test_labelled_texts(kind: str, model: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", RECORDS)
    if kind == "csv":
        path = tmp_path / "mine.csv"
        path.write_text("text,label\n" + "".join(f'"{r["text"]}, ""so"" ",{r["label"]}\n' for r in RECORDS))
    (tmp_path / "names.txt").write_text("no\nyes\n")
    arguments: dict[str, Any] = {
        "train": str(path), "num_clients": 1, "batch_size": 4, "max_length": 26, "labels": str(tmp_path / "names.txt"),
    }  # fmt: skip
    if kind == "prompted":
        arguments |= {"prompt": "{text} It was", "label_words": [" bad", " great"]}
    there = ClassificationData(**arguments, validation=str(path), tokenizer=model.tokenizer())
    section = {"class_path": "hosfl_lightning.data.ClassificationData", "init_args": arguments}
    here = device(path, section, model, tmp_path)
    assert max(len(one.values) for one in here.examples) == 26  # some are cut
    same_batches(there, here, tokens if kind == "prompted" else len)


class Pictures(ImageData):
    pixels: Any = None

    def read(self, split: str) -> list[ImageExample]:
        return [ImageExample(torch.from_numpy(p), i % 3) for i, p in enumerate(self.pixels)] * (split != "test")


def test_images(model: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", images=pixels[:, 0], labels=np.arange(7) % 3)
    arguments = {"num_clients": 1, "mean": [0.4, 0.5, 0.45], "std": 0.3, "batch_size": 2}
    there = Pictures(**arguments)
    there.pixels = pixels
    section = {"class_path": "hosfl_lightning.data.ImageData", "init_args": arguments}
    same_batches(there, device(tmp_path / "mine.npz", section, model, tmp_path), len)


@pytest.mark.parametrize(
    ("content", "section", "own", "said"),
    [
        ("", {"kind": "labelled"}, {}, "holds no example"),
        ("{", {"kind": "labelled"}, {}, "line 1: not valid JSON"),
        ('{"text": "a"}', {"kind": "labelled"}, {}, "has no 'label', only text; set --label-field"),
        ('{"text": 3, "label": 0}', {"kind": "labelled"}, {}, "'text' must be a text"),
        ('{"text": "a", "label": "x"}', {"kind": "labelled"}, {}, "label 'x' is none of the exported ones"),
        ('{"text": "a", "label": 2}', {"kind": "labelled", "label_names": ["n", "y"]}, {}, "is not in 0..1"),
        ('{"text": "a", "label": 4294967296}', {"kind": "labelled"}, {}, r"4294967296 is not in 0\.\.2147483647"),
        ('{"text": "a", "label": -1}', {"kind": "labelled"}, {}, r"-1 is not in 0\.\.2147483647"),
        ('{"text": "a"}', {"kind": "blocks"}, {}, "too few for a block of 128"),
        ('{"text": "a"}', {"kind": "blocks"}, {"batch_size": 0}, "--batch-size must be an integer >= 1"),
        ('{"text": "a"}', {"kind": "blocks", "new": 1}, {}, "has 'new', which this version does not know"),
        ('{"text": "a"}', {"kind": "blocks", "pad": None}, {}, "its manifest's data has pad = None"),
        ('{"text": "a"}', {"kind": "blocks", "eos": -1}, {}, "its manifest's data has eos = -1"),
        ('{"text": "a"}', {"kind": "prompted", "label_words": "ab"}, {}, "its manifest's data has label_words = 'ab'"),
        ('{"text": "a"}', {"kind": "images", "std": [float("nan")]}, {}, "its manifest's data has std ="),
        ('{"text": "a"}', {"kind": "images", "channels": 2}, {}, "its manifest's data has channels = 2"),
        ('{"text": "a"}', {"kind": "labelled", "seed": 2**64}, {}, "its manifest's data has seed ="),
        ('{"text": "a"}', None, {}, "tells of no data that this client reads"),
    ],
)
def test_what_is_refused(
    content: str, section: Any, own: dict[str, Any], said: str, model: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    (tmp_path / "tokenizer.json").write_text(model.tokenizer().backend_tokenizer.to_str())
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path / "mine.jsonl", DataSettings.of(section, **own), Text(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("mine.csv", "blocks", r"mine\.csv is empty; its first line names the fields"),
        ("mine.pdf", "blocks", r"mine\.pdf must be \.txt, \.md, \.jsonl or \.csv$"),
        ("mine.txt", "labelled", r"mine\.txt must be \.jsonl or \.csv, with a text and a label a record"),
    ],
)
def test_files_of_another_kind(name: str, kind: str, said: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"" if name.endswith("csv") else b"\xff")
    (tmp_path / "tokenizer.json").write_text(model.tokenizer().backend_tokenizer.to_str())
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path / name, DataSettings(kind), Text(tmp_path / "tokenizer.json"))


def test_what_the_process_apart_refuses_is_said_by_this_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(DataError, match=r"^--half: its tokenizer .* cannot be read"):
        read_apart(tmp_path / "mine.txt", DataSettings("blocks"), tmp_path / "tokenizer.json")


def test_nothing_of_the_folder_it_is_started_in_is_imported(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text(model.tokenizer().backend_tokenizer.to_str())
    (tmp_path / "mine.txt").write_text("abc" * 200)
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    assert read_apart(Path("mine.txt"), DataSettings("blocks", sequence_length=8), Path("tokenizer.json"))


def test_a_number_is_one_label_however_it_is_written(model: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"text": "a", "label": label} for label in (1, 1.0, "1", "01", "+1.0")])
    (tmp_path / "tokenizer.json").write_text(model.tokenizer().backend_tokenizer.to_str())
    found = read_examples(path, DataSettings("labelled"), Text(tmp_path / "tokenizer.json"))
    assert [int(one.labels) for one in found] == [1] * 5


def test_nothing_in_an_archive_is_executed(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images=np.array([{}], object), labels=np.zeros(1, int))
    with pytest.raises(DataError, match=r"must be a \.npz with the arrays"):
        read_examples(tmp_path / "bad.npz", DataSettings("images"), None)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and then nothing", b"no archive"])
def test_a_file_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"must be a \.npz with the arrays"):
        read_examples(tmp_path / "bad.npz", DataSettings("images"), None)


def test_a_class_below_zero_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([1, -100]))
    half = SimpleNamespace(labels="example", classes=3, inputs=[SimpleNamespace(shape=(-1, 3, 8, 8))])
    settings = DataSettings("images")
    with pytest.raises(DataError, match=r"label -100 is not in 0\.\.2"):
        check_examples(read_examples(tmp_path / "mine.npz", settings, None), half, settings)


def test_what_the_half_cannot_take(model: Any, tmp_path: Path) -> None:
    half = SimpleNamespace(vocabulary=50, max_length=None, labels="token", classes=50, inputs=[])
    (tmp_path / "mine.txt").write_text("abc" * 200)
    section = {"class_path": "hosfl_lightning.data.TextData", "init_args": {"sequence_length": 32}}
    here = device(tmp_path / "mine.txt", section, model, tmp_path)
    with pytest.raises(DataError, match="it embeds 50"):
        check_examples(here.examples, half, here.settings)
    half.vocabulary, half.max_length = 400, 16
    with pytest.raises(DataError, match="has 16 positions"):
        check_examples(here.examples, half, here.settings)
    half.classes, half.max_length, short = 400, 64, here.examples[0]._replace(values=here.examples[0].values[:5])
    check_examples([*here.examples, short], half, replace(here.settings, pad=399))
    check_examples(here.examples, half, replace(here.settings, pad=400))  # nothing is padded
    with pytest.raises(DataError, match="token 400, it embeds 400"):
        check_examples([*here.examples, short], half, replace(here.settings, pad=400))
    with pytest.raises(DataError, match="has no token"):
        check_examples([short._replace(values=short.values[:0])], half, here.settings)
    half.labels = "example"
    with pytest.raises(DataError, match="labels of another kind"):
        check_examples(here.examples, half, here.settings)
