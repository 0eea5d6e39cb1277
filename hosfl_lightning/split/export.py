"""The trained split model as one standard PEFT adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import IA3Config, PeftModel
from peft.tuners.ia3 import IA3Layer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hosfl_lightning.data.labels import LABELS, write_label_names
from hosfl_lightning.files import sync
from hosfl_lightning.split.side import ADAPTER

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: The folder of (IA)³, in that of the LoRA adapter: PEFT has no adapter that is both.
IA3 = "ia3"
_FILES = {CONFIG, TENSORS, LABELS, IA3}
#: How PEFT names what is in its models.
PREFIX = "base_model.model."


def export_adapter(
    peft_model: PeftModel,
    directory: str | Path,
    base_model_name_or_path: str | None = None,
    label_names: Sequence[str] | None = None,
    in_place: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, both halves in one adapter.

    ``PeftModel.from_pretrained(base, directory)`` then gives the split model's logits. (IA)³ is an adapter of its own
    and goes into the base first: ``PeftModel.from_pretrained(base, f"{directory}/ia3").merge_and_unload()``. The folder
    appears complete or not at all: it is written beside, synced and renamed; an adapter that is there already is
    replaced.

    Args:
        peft_model: what :func:`hosfl_lightning.split.add_lora` returned.
        directory: where to.
        base_model_name_or_path: the base model that the adapter names; by default the one it knows.
        label_names: of a classifier: written into ``labels.json``, a list; ``dict(enumerate(list))`` is the
            ``id2label`` that the base model's ``from_pretrained`` takes. An adapter itself has no place for them: PEFT
            warns of keys that it does not know, and with a ``config.json`` in the folder transformers looks for the
            base model's weights there.
        in_place: trained parameters of the base model, by name: whole modules become ``modules_to_save``, biases alone
            ``bias: all``, which PEFT loads.

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
        if in_place:
            _add(staging / "new", in_place)
        _write_ia3(peft_model.get_base_model(), staging / "new" / IA3, base)
        if label_names is not None:
            (staging / "new" / LABELS).write_bytes(write_label_names(label_names))
        for file in [*(staging / "new").rglob("*"), staging / "new"]:
            sync(file)
        if directory.exists():
            directory.rename(staging / "old")
        (staging / "new").rename(directory)
        sync(directory.parent)
    finally:
        config.base_model_name_or_path = given
        shutil.rmtree(staging)
    return directory


def _add(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Parameters of the base model into an adapter, under the names and settings by which PEFT takes them back."""
    tensors, config = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())
    if all(name.endswith("bias") for name in parameters):
        config["bias"] = "all"
    else:
        modules = {name.rpartition(".")[0] for name in parameters}
        config["modules_to_save"] = sorted({*(config["modules_to_save"] or []), *modules})
    tensors |= {PREFIX + name: tensor.detach().contiguous() for name, tensor in parameters.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _write_ia3(model: nn.Module, folder: Path, base: str) -> None:
    """The (IA)³ layers of a model as an adapter of their own; nothing, if there are none."""
    layers: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, IA3Layer)}
    if not layers:
        return
    IA3Config(
        target_modules=sorted(layers),
        feedforward_modules=sorted(name for name, layer in layers.items() if layer.is_feedforward),
        fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    factors = {f"{PREFIX}{name}.ia3_l": layer.ia3_l[ADAPTER].detach().contiguous() for name, layer in layers.items()}
    save_file(factors, folder / TENSORS, metadata={"format": "pt"})
