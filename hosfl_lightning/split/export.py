"""The trained split model as one standard PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from hosfl_lightning.data.labels import LABELS, write_label_names
from hosfl_lightning.files import sync

_FILES = {"adapter_config.json", "adapter_model.safetensors", LABELS}


def export_adapter(
    peft_model: PeftModel,
    directory: str | Path,
    base_model_name_or_path: str | None = None,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, both halves in one adapter.

    ``PeftModel.from_pretrained(base, directory)`` then gives the split model's logits. The folder appears complete
    or not at all: it is written beside, synced and renamed; an adapter that is there already is replaced.

    Args:
        peft_model: what :func:`hosfl_lightning.split.add_lora` returned.
        directory: where to.
        base_model_name_or_path: the base model that the adapter names; by default the one it knows.
        label_names: of a classifier: written into ``labels.json``, a list; ``dict(enumerate(list))`` is the
            ``id2label`` that the base model's ``from_pretrained`` takes. An adapter itself has no place for them: PEFT
            warns of keys that it does not know, and with a ``config.json`` in the folder transformers looks for the
            base model's weights there.

    Raises:
        ValueError: no base model is known: an adapter that names none cannot be loaded by itself.
        FileExistsError: ``directory`` holds anything but an adapter.
    """
    directory = Path(directory)
    config = peft_model.peft_config["default"]
    base = base_model_name_or_path or config.base_model_name_or_path
    if not base:
        raise ValueError("base_model_name_or_path is not set and the model has no name: pass the base model's.")
    other = {file.name for file in directory.iterdir()} - _FILES if directory.exists() else set()
    if other:
        raise FileExistsError(f"{directory} holds {', '.join(sorted(other))}: an adapter needs a directory of its own.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    given, config.base_model_name_or_path = config.base_model_name_or_path, base
    staging = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(staging, ignore_errors=True)  # what a kill left
    try:
        peft_model.save_pretrained(str(staging / "new"), save_embedding_layers=False)
        (staging / "new" / "README.md").unlink(missing_ok=True)  # an empty model card
        if label_names is not None:
            (staging / "new" / LABELS).write_bytes(write_label_names(label_names))
        for file in [*(staging / "new").iterdir(), staging / "new"]:
            sync(file)
        if directory.exists():
            directory.rename(staging / "old")
        (staging / "new").rename(directory)
        sync(directory.parent)
    finally:
        config.base_model_name_or_path = given
        shutil.rmtree(staging)
    return directory
