"""Recipes run through the command line on a tiny random model and generated data in place of the hub's."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import yaml
from PIL import Image
from transformers import AutoTokenizer

from hosfl_lightning import cli
from hosfl_lightning.models.pretrained import TINY_LM, resolve
from hosfl_lightning.recipe import HOSFLCommand
from tests.split.tiny_images import tiny_image_model
from tests.split.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
#: For a process to find this tree's packages, and no others.
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "client")])
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in ("overlays", "compare"))
OVERLAYS = sorted((ROOT / "recipes" / "overlays").glob("*.yaml"))
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
#: A recipe's folder: the architecture of its model. A recipe in a new folder needs a line here.
ARCHITECTURES = {
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "llama3_2": "llama",
    "minilm": "bert",
    "opt": "opt",
    "qwen3": "qwen3",
    "recipes": "llama",
    "resnet18": "ResNet",
    "smollm2": "llama",
    "stories260k": "llama",
    "tiny_lm": "llama",
    "vision": "MobileNetV2",
}
VOCAB = 260  # of the byte tokenizer
#: Image sets as they lie on the hub: the number of classes in each label field, beside the field "img".
HUB = {"uoft-cs/cifar10": {"label": 10}, "uoft-cs/cifar100": {"fine_label": 100, "coarse_label": 20}}


def name_of(path: Path) -> str:
    """As the header's command spells it."""
    return path.relative_to(ROOT).as_posix()


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def header_commands(path: Path) -> list[list[str]]:
    """The ``hosfl`` commands in the comment a recipe begins with, split as a shell would."""
    lines = path.read_text().splitlines()
    header = "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return [shlex.split(found) for found in re.findall(r"^hosfl .*$", header.replace("\\\n", " "), flags=re.MULTILINE)]


@contextmanager
def command_line() -> Iterator[pytest.MonkeyPatch]:
    """As in a shell at the repository's root, not as inside pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["hosfl"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what jsonargparse renamed
        yield patch


def hosfl(*args: str) -> HOSFLCommand:
    """``hosfl args`` in this process; returns what the command leaves: trainer, model and data."""
    kept = []

    class Kept(HOSFLCommand):
        def __init__(self, *a: Any, **kwargs: Any) -> None:
            kept.append(self)
            super().__init__(*a, **kwargs)

    with command_line() as patch:
        patch.setattr("hosfl_lightning.recipe.HOSFLCommand", Kept)
        try:
            cli.main(list(args))
        except SystemExit as end:
            raise RuntimeError(f"hosfl {shlex.join(args)} ended with exit code {end.code}") from end
    return kept[0]


class HubSet(list[dict[str, Any]]):
    """What ``load_dataset`` returns, as far as it is read."""

    features: dict[str, Any]


def load_dataset(name: str, config: str | None, split: str) -> HubSet:
    """200 small images of one colour in the fields of the real set; the colour tells the class."""
    rows = HubSet({"img": Image.new("RGB", (8, 8), (i, 0, 0))} for i in range(200))
    for row, i in zip(rows, range(200)):
        row.update({field: i % classes for field, classes in HUB[name].items()})
    names = {field: SimpleNamespace(names=list(map(str, range(n)))) for field, n in HUB[name].items()}
    rows.features = {"img": SimpleNamespace(), **names}
    return rows


@contextmanager
def stand_in_hub() -> Iterator[None]:
    """`HUB` in place of the hub's data sets, whether or not ``datasets`` is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        yield


def small(recipe: Path, folder: Path) -> list[str]:
    """Arguments that shrink a recipe: two rounds, a tiny model of its architecture, local data, little of it."""
    settings = load(recipe)
    model = small_model(settings["model"], ARCHITECTURES[recipe.parent.name], folder)
    data = {"batch_size": 2, **small_data(settings["data"], folder)}
    return [
        "--trainer.max_rounds=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder / 'runs'}",
        *(f"--model.init_args.{name}={value}" for name, value in model.items()),
        *(f"--data.init_args.{name}={value}" for name, value in data.items()),
    ]


def small_model(model: dict[str, Any], architecture: str, folder: Path) -> dict[str, Any]:
    """A tiny pretrained model in place of a recipe's; a network to train from scratch is small."""
    kind, init_args = model["class_path"].rpartition(".")[2], model["init_args"]
    if "network" in init_args:
        return {}
    if kind == "SplitImageClassifier":
        return {"pretrained": tiny_pretrained_images(folder / architecture, architecture)}
    layers = init_args["cut"] + 1
    path = folder / f"tiny_{architecture}_{layers}"
    return {"pretrained": tiny_pretrained(path, architecture, layers, kind.endswith("Classifier"))}


def tiny_pretrained(folder: Path, architecture: str, layers: int, classifier: bool = False) -> Path:
    """A folder as a user's: random weights of that architecture, no head for a classifier, and the byte tokenizer."""
    if not folder.exists():
        auto = transformers.AutoModel if classifier else transformers.AutoModelForCausalLM
        sizes = {"num_hidden_layers": layers, "vocab_size": VOCAB, "max_position_embeddings": 256, "layer_types": None}
        tiny_model(architecture, auto, **sizes).save_pretrained(folder)
        AutoTokenizer.from_pretrained(resolve(TINY_LM)).save_pretrained(folder)
    return folder


def tiny_pretrained_images(folder: Path, architecture: str) -> Path:
    """A folder as a user's: random weights of that architecture, its convolutions of gain 1 or nothing would arrive."""
    model = tiny_image_model(architecture, noise=0)
    for weight in (p.detach() for p in model.parameters() if p.ndim == 4):
        weight.mul_((2 / weight[0].numel()) ** 0.5 / weight.std())
    model.save_pretrained(folder)
    return folder


def small_data(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Generated files in place of a recipe's data, by the kind of data it names."""
    kind, init_args = data["class_path"].rpartition(".")[2], data["init_args"]
    if kind == "DocstringData":
        return {"max_bytes_per_client": 9000, "validation_bytes_per_client": 1500, "test_bytes_per_client": 1500}
    if kind == "TextData":
        text = f"[{text_file(folder / 'text.txt')}]"
        return {"files": text, "validation_files": text}
    if kind == "DigitsData":
        return {}
    if kind == "FashionMNISTData":
        return {"folder": idx_files(folder / "images"), "max_validation_examples": 8}
    if kind == "HubImageData":
        return {"max_validation_examples": 8}
    if kind == "InstructionData":
        return {"train": chat_file(folder / "chats.jsonl")}
    names = [word.strip() for word in init_args.get("label_words", map(str, range(77)))]
    labels = folder / "labels.json"
    labels.write_text(json.dumps(names))
    sets = {n: labelled_file(folder / f"{n}.jsonl", init_args, len(names)) for n in ("train", "validation", "test")}
    return {**sets, "labels": labels, "hub": "null"}


def text_file(path: Path) -> Path:
    """About 4,000 characters of English numbers."""
    path.write_text("".join(f"{i} and {i * i} make {i + i * i}.\n" for i in range(160)))
    return path


def chat_file(path: Path) -> Path:
    """60 short conversations of two turns each."""
    turns = [("user", "what is {0}?"), ("assistant", "{0}"), ("user", "and twice?"), ("assistant", "{1}")]
    chats = [[{"role": role, "content": said.format(i, 2 * i)} for role, said in turns] for i in range(60)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def labelled_file(path: Path, init_args: dict[str, Any], classes: int) -> Path:
    """200 short texts that tell their class, in the fields that the recipe names."""
    text, label = init_args.get("text_field", "text"), init_args.get("label_field", "label")
    rows = [{text: f"number {i % classes} of {i}", label: i % classes} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def idx_files(folder: Path) -> Path:
    """200 images of 2x2 pixels to train on and 20 to test on, in the files of Fashion-MNIST."""
    folder.mkdir()
    for prefix, count in (("train", 200), ("t10k", 20)):
        for name, shape in (("images-idx3", (count, 2, 2)), ("labels-idx1", (count,))):
            header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            values = bytes(i % 10 + 60 * j for i in range(count) for j in range(math.prod(shape[1:])))
            (folder / f"{prefix}-{name}-ubyte").write_bytes(header + values)
    return folder


@dataclass
class Finished:
    """A run from the command line, and where it lies."""

    command: HOSFLCommand
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "version_0"

    @property
    def checkpoint(self) -> str:
        return f"--ckpt_path={self.folder}/checkpoints/last.ckpt"

    def again(self, action: str, *args: str) -> HOSFLCommand:
        """Another command from the run's own config, in another folder."""
        where = f"--trainer.default_root_dir={self.root / action}"
        return hosfl(action, f"--config={self.folder}/config.yaml", where, *args)

    def copy(self, to: Path) -> Path:
        """A run folder that may be damaged."""
        return Path(shutil.copytree(self.folder, to))
