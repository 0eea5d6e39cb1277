"""Recipes run through the command line on a tiny random model and generated data in place of the hub's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from transformers import AutoTokenizer

from hosfl_lightning import cli
from hosfl_lightning.servers.pretrained import TINY_LM, resolve
from tests.split.tiny_models import tiny_model

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name not in ("overlays", "compare"))
OVERLAYS = sorted((ROOT / "recipes" / "overlays").glob("*.yaml"))
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
#: A recipe's folder: the architecture of its model. A recipe in a new folder needs a line here.
ARCHITECTURES = {
    "gemma3": "gemma3_text",
    "llama3_2": "llama",
    "minilm": "bert",
    "opt": "opt",
    "qwen3": "qwen3",
    "recipes": "llama",
    "stories260k": "llama",
    "tiny_lm": "llama",
}
VOCAB = 260  # of the byte tokenizer


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


def hosfl(*args: str) -> cli.HOSFLCommand:
    """``hosfl args`` in this process; returns what the command leaves: trainer, model and data."""
    kept = []

    class Kept(cli.HOSFLCommand):
        def __init__(self, *a: Any, **kwargs: Any) -> None:
            kept.append(self)
            super().__init__(*a, **kwargs)

    with command_line() as patch:
        patch.setattr(cli, "HOSFLCommand", Kept)
        try:
            cli.main(list(args))
        except SystemExit as end:
            raise RuntimeError(f"hosfl {shlex.join(args)} ended with exit code {end.code}") from end
    return kept[0]


def small(recipe: Path, folder: Path) -> list[str]:
    """Arguments that shrink a recipe: two rounds, a tiny model of its architecture, local data, little of it."""
    settings = load(recipe)
    classifier = settings["model"]["class_path"].endswith("Classifier")
    architecture, layers = ARCHITECTURES[recipe.parent.name], settings["model"]["init_args"]["cut"] + 1
    model = tiny_pretrained(folder / f"tiny_{architecture}_{layers}", architecture, layers, classifier)
    data = {"batch_size": 2, **small_data(settings["data"], folder)}
    return [
        "--trainer.max_rounds=2",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder / 'runs'}",
        f"--model.init_args.pretrained={model}",
        *(f"--data.init_args.{name}={value}" for name, value in data.items()),
    ]


def tiny_pretrained(folder: Path, architecture: str, layers: int, classifier: bool = False) -> Path:
    """A folder as a user's: random weights of that architecture, no head for a classifier, and the byte tokenizer."""
    if not folder.exists():
        auto = transformers.AutoModel if classifier else transformers.AutoModelForCausalLM
        sizes = {"num_hidden_layers": layers, "vocab_size": VOCAB, "max_position_embeddings": 256, "layer_types": None}
        tiny_model(architecture, auto, **sizes).save_pretrained(folder)
        AutoTokenizer.from_pretrained(resolve(TINY_LM)).save_pretrained(folder)
    return folder


def small_data(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Generated files in place of a recipe's data, by the kind of data it names."""
    kind, init_args = data["class_path"].rpartition(".")[2], data["init_args"]
    if kind == "DocstringData":
        return {"max_bytes_per_client": 9000, "validation_bytes_per_client": 1500, "test_bytes_per_client": 1500}
    if kind == "TextData":
        return {"files": f"[{text_file(folder / 'text.txt')}]"}
    names = [word.strip() for word in init_args.get("label_words", map(str, range(77)))]
    labels = folder / "labels.json"
    labels.write_text(json.dumps(names))
    sets = {n: labelled_file(folder / f"{n}.jsonl", init_args, len(names)) for n in ("train", "validation", "test")}
    return {**sets, "labels": labels, "hub": "null"}


def text_file(path: Path) -> Path:
    """About 4,000 characters of English numbers."""
    path.write_text("".join(f"{i} and {i * i} make {i + i * i}.\n" for i in range(160)))
    return path


def labelled_file(path: Path, init_args: dict[str, Any], classes: int) -> Path:
    """200 short texts that tell their class, in the fields that the recipe names."""
    text, label = init_args.get("text_field", "text"), init_args.get("label_field", "label")
    rows = [{text: f"number {i % classes} of {i}", label: i % classes} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Finished:
    """A run from the command line, and where it lies."""

    command: cli.HOSFLCommand
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "version_0"

    @property
    def checkpoint(self) -> str:
        return f"--ckpt_path={self.folder}/checkpoints/last.ckpt"

    def again(self, action: str, *args: str) -> cli.HOSFLCommand:
        """Another command from the run's own config, in another folder."""
        where = f"--trainer.default_root_dir={self.root / action}"
        return hosfl(action, f"--config={self.folder}/config.yaml", where, *args)

    def copy(self, to: Path) -> Path:
        """A run folder that may be damaged."""
        return Path(shutil.copytree(self.folder, to))
