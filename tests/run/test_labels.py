"""The names of the classes go from the data into the run folder, the checkpoint, the model and the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from hosfl_lightning import HOSFL, Orchestrator, SplitSequenceClassifier
from hosfl_lightning.data import ClassificationData
from hosfl_lightning.join import _own_data
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.split import Lora, LoraHalf
from tests.recipe_runs import tiny_pretrained

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")
NAMES = ["3", "1", "none"]
CONFIG: dict[str, Any] = {"id2label": {0: "3", 1: "1", 2: "none"}, "label2id": {"3": 0, "1": 1, "none": 2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    tiny_pretrained(folder / "model", "bert", 2, classifier=True)
    lines = [json.dumps({"text": f"text {i}", "label": NAMES[i % 3]}) for i in range(12)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "labels.txt").write_text("\n".join(NAMES))
    return folder


def model(root: Path, **settings: Any) -> SplitSequenceClassifier:
    half = LoraHalf(r=2, target_modules=["query"])
    return SplitSequenceClassifier(str(root / "model"), 1, **{"num_labels": 3, "lora": Lora(half, half), **settings})


def data(root: Path, **settings: Any) -> ClassificationData:
    train = str(root / "train.jsonl")
    return ClassificationData(
        train, validation=train, **{"num_clients": 2, "labels": str(root / "labels.txt"), **settings}
    )


def trainer(root: Path) -> Orchestrator:
    return Orchestrator(HOSFL(), max_rounds=1, default_root_dir=str(root / "runs"), enable_progress_bar=False)


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    ran = trainer(root)
    ran.fit(model(root), data(root))
    return Path(ran.log_dir)


def test_they_are_in_the_run_folder_and_data_reads_them_there(run: Path, root: Path) -> None:
    assert json.loads((run / "labels.json").read_text()) == NAMES
    again = data(root, labels=str(run / "labels.json"), tokenizer=str(root / "model"))
    again.setup("fit")
    assert again.label_names == NAMES


def test_they_are_beside_the_adapter_for_the_base_models_configuration(run: Path, root: Path) -> None:
    adapter = run / "adapter"
    names = json.loads((adapter / "labels.json").read_text())
    assert names == NAMES
    names = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    base = AutoModelForSequenceClassification.from_pretrained(root / "model", **names)
    loaded = PeftModel.from_pretrained(base, adapter)
    assert loaded.config.num_labels == 3
    assert loaded.config.id2label == CONFIG["id2label"]
    PeftConfig.from_pretrained(adapter)  # PEFT warns of what it does not know, and warnings are errors here
    auto = AutoPeftModelForSequenceClassification.from_pretrained(adapter, **names)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(auto.eval()(ids).logits, loaded.eval()(ids).logits)
    plain = AutoModelForSequenceClassification.from_pretrained(adapter, **names)
    assert plain.config.label2id == CONFIG["label2id"]


def test_they_are_in_the_models_configuration(root: Path) -> None:
    here = model(root)
    trainer(root).validate(here, data(root))
    assert here.whole.config.id2label == CONFIG["id2label"]
    assert here.whole.get_base_model().config.label2id == CONFIG["label2id"]


def test_an_adapter_of_a_checkpoint_has_them_too(run: Path, root: Path, tmp_path: Path) -> None:
    trainer(root).export(model(root), None, str(run / "checkpoints" / "last.ckpt"), str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "labels.json").read_text()) == NAMES


@pytest.mark.parametrize("how", ["fit", "validate"])
def test_classes_in_another_order_are_refused(run: Path, root: Path, how: str) -> None:
    """Inferred they are sorted."""
    path = str(run) if how == "fit" else str(run / "checkpoints" / "last.ckpt")
    record = r"data.init_args.labels is null, the run was made with .*labels.txt"  # a run compares more than weights do
    classes = r"trained with other classes .*: '3' is '1' there; set .* labels.json of"
    with pytest.raises(CheckpointError, match=record if how == "fit" else classes):
        getattr(trainer(root), how)(model(root), data(root, labels=None), ckpt_path=path)
    assert json.loads((run / "labels.json").read_text()) == NAMES


def test_the_model_has_as_many_classes(root: Path) -> None:
    message = r"model.init_args.num_labels is 4, and the data has 3 classes \(3, 1, none\): set it to that number, or"
    with pytest.raises(ValueError, match=message):
        trainer(root).fit(model(root, num_labels=4), data(root))


def test_a_client_elsewhere_that_knows_fewer_names_is_refused(root: Path, tmp_path: Path) -> None:
    """Its own records have two of the three, whose indices would be other ones."""
    lines = [json.dumps({"text": f"text {i}", "label": NAMES[1 + i % 2]}) for i in range(8)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    own, terms = str(tmp_path / "own.jsonl"), SimpleNamespace(client=0)
    device = model(root, part="client")
    with pytest.raises(ValueError, match=r"num_labels is 3, and the data has 2 classes \(1, none\): .* file with all"):
        _own_data(terms, device, ClassificationData(own, validation=own, num_clients=1), None)  # type: ignore[arg-type]
    named = ClassificationData(own, validation=own, num_clients=1, labels=str(root / "labels.txt"))
    _own_data(terms, device, named, None)  # type: ignore[arg-type]
    assert {example.labels for example in named.clients[0]} == {1, 2}


def test_integers_have_no_names(root: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i}", "label": i % 3}) for i in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    ran = trainer(root)
    ran.fit(model(root), ClassificationData(str(tmp_path / "train.jsonl"), num_clients=2))
    assert not (Path(ran.log_dir) / "labels.json").exists()
    assert not (Path(ran.log_dir) / "adapter" / "labels.json").exists()
