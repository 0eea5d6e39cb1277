"""Data modules with a partitioner: by word, as an object, by class path in a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from transformers import PreTrainedTokenizerBase

from hosfl_lightning.data import (
    IID,
    ByField,
    ByFile,
    ClassificationData,
    DigitsData,
    Dirichlet,
    FederatedDataModule,
    HubImageData,
    Partitioner,
    QuantitySkew,
    Shards,
    TextData,
)

Write = Callable[[str, Any], str]
RECORDS = [{"text": f"text {i}", "label": i % 3, "writer": f"w{i % 4}"} for i in range(40)]
SHIPPED: list[tuple[Partitioner, dict[str, Any]]] = [
    (IID(), {}), (Dirichlet(), {"alpha": 0.1, "min_examples_per_client": 2}), (Shards(), {"shards_per_client": 3}),
    (QuantitySkew(), {"power": 1.5}), (ByField(""), {"field": "writer"}), (ByFile(), {}),
]  # fmt: skip


def ready(data: FederatedDataModule) -> list[list[Any]]:
    """What each client holds, once it is known."""
    data.setup("fit")
    return [[tuple(torch.as_tensor(example[0]).flatten().tolist()) for example in held] for held in data.clients]


def in_a_recipe(kind: str, **init_args: Any) -> FederatedDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FederatedDataModule, "data")
    config = parser.parse_object({"data": {"class_path": f"hosfl_lightning.data.{kind}", "init_args": init_args}})
    return parser.instantiate(config).data


def test_words_and_objects_are_the_same_in_classification(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write("a.jsonl", RECORDS)

    def make(**settings: Any) -> list[list[Any]]:
        return ready(ClassificationData(path, tokenizer=tokenizer, seed=3, **settings))

    assert make(num_clients=5) == make(num_clients=5, partitioner=IID())
    word = {"partition": "dirichlet", "alpha": 0.2, "min_examples_per_client": 2}
    assert make(num_clients=5, **word) == make(num_clients=5, partitioner=Dirichlet(0.2, 2))
    by_word = ClassificationData(path, tokenizer=tokenizer, partition="field", field="writer")
    by_object = ClassificationData(path, tokenizer=tokenizer, partitioner=ByField("writer"))
    assert ready(by_word) == ready(by_object)
    assert by_word.client_names == by_object.client_names == ["w0", "w1", "w2", "w3"]


def test_words_and_objects_are_the_same_in_text(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    files = [write("b.txt", "b" * 40), write("a.txt", "a" * 80)]

    def make(**settings: Any) -> TextData:
        return TextData(files, tokenizer=tokenizer, sequence_length=4, **settings)

    assert ready(make(num_clients=5)) == ready(make(num_clients=5, partitioner=IID()))
    by_word, by_object = make(partition="by_file"), make(partitioner=ByFile())
    assert ready(by_word) == ready(by_object)
    assert by_word.client_names == by_object.client_names == ["b", "a"]
    with pytest.raises(ValueError, match="Dirichlet needs the label of each example, which TextData does not have"):
        ready(make(num_clients=2, partitioner=Dirichlet()))


def test_words_and_objects_are_the_same_in_images() -> None:
    word = DigitsData(num_clients=100, partition="dirichlet", alpha=0.1, max_train_examples=1000)
    parts = ready(word)
    assert parts == ready(DigitsData(num_clients=100, partitioner=Dirichlet(0.1), max_train_examples=1000))
    assert min(map(len, parts)) == 1
    assert sum(map(len, parts)) == 1000
    with pytest.raises(ValueError, match="ByField needs field 'writer' of each example, which DigitsData does not"):
        ready(DigitsData(num_clients=None, partitioner=ByField("writer")))


def test_images_of_the_hub_by_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeDataset(list[Any]):
        features = {"label": SimpleNamespace(names=["a", "b"])}

    rows = [{"image": Image.new("L", (2, 2)), "label": i % 2, "writer_id": f"f{i % 3}"} for i in range(30)]
    module = SimpleNamespace(load_dataset=lambda name, config, split: FakeDataset(rows))
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = HubImageData("some/set", num_clients=None, partitioner=ByField("writer_id"), channels=1)
    data.setup("fit")
    assert data.client_names == ["f0", "f1", "f2"]
    assert [{example.fields["writer_id"] for example in held} for held in data.clients] == [{"f0"}, {"f1"}, {"f2"}]
    other = HubImageData("some/set", num_clients=None, partitioner=ByField("writer"), channels=1)
    with pytest.raises(ValueError, match=r"an image has no field 'writer' \(field\); its fields are: label, writer_id"):
        other.setup("fit")


@pytest.mark.parametrize(("partitioner", "init_args"), SHIPPED, ids=[type(one).__name__ for one, _ in SHIPPED])
@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        ("ClassificationData", {"train": "a.csv"}),
        ("TextData", {"files": ["a.txt"]}),
        ("DigitsData", {}),
        ("FashionMNISTData", {"folder": "x"}),
        ("ImageFolderData", {"folder": "x"}),
        ("HubImageData", {"hub": "x"}),
    ],
)
@pytest.mark.parametrize("place", ["hosfl_lightning.data.", ""], ids=["path", "name"])
def test_a_recipe_names_every_partitioner_in_every_data_module(
    kind: str, needed: dict[str, Any], partitioner: Partitioner, init_args: dict[str, Any], place: str
) -> None:
    path = place + type(partitioner).__name__
    data: Any = in_a_recipe(kind, **needed, partitioner={"class_path": path, "init_args": init_args})
    assert type(data.partitioner) is type(partitioner)
    assert {name: getattr(data.partitioner, name) for name in init_args} == init_args


def test_a_users_own_by_class_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts.py").write_text(
        "import torch\nfrom hosfl_lightning.data import Partitioner\n\n\n"
        "class EveryNth(Partitioner):\n"
        "    def __init__(self, step: int) -> None:\n"
        "        self.step = step\n\n"
        "    def __call__(self, examples, seed):\n"
        "        return [torch.arange(first, len(examples), self.step) for first in range(self.step)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {"class_path": "my_parts.EveryNth", "init_args": {"step": 7}}
    data = in_a_recipe("DigitsData", num_clients=None, partitioner=own)
    assert [len(part) for part in ready(data)] == [155] + [154] * 6
    with pytest.raises(ValueError, match="num_clients=10: EveryNth makes 7 clients; set it to that or null"):
        ready(in_a_recipe("DigitsData", partitioner=own))


def test_an_empty_client_has_no_minibatch() -> None:
    data = DigitsData(num_clients=100, partition="dirichlet", alpha=0.01, min_examples_per_client=0)
    parts = ready(data)
    empty = [client for client, part in enumerate(parts) if not part]
    assert data.num_clients == 100
    assert data.holders == [client for client in range(100) if client not in empty]
    assert empty
    with pytest.raises(ValueError, match=f"client={empty[0]} holds no example"):
        data.client_batch(empty[0], 0)
