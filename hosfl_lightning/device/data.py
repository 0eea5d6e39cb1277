"""What a device must know of a recipe's data to make the batches that a client in PyTorch would make."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from hosfl_lightning.data import ClassificationData, DocstringData, ImageData, TextData
from hosfl_lightning.data.labels import read_label_names
from hosfl_lightning.data.tokenization import pad_token_id
from hosfl_lightning.models import SplitModule


def data_of(section: Any, model: SplitModule) -> dict[str, Any] | None:
    """The manifest's ``data`` of a recipe's; None: there is none, or a device does not read such data.

    Args:
        section: ``class_path`` and ``init_args``, as in the file.
        model: Whose tokenizer it is.
    """
    kind = _class(section)
    if kind is None:
        return None
    arguments = inspect.signature(kind).parameters
    given = {name: one.default for name, one in arguments.items()} | dict(section.get("init_args") or {})
    if given.get("tokenizer") is not None:
        return None
    told = {"batch_size": given["batch_size"], "seed": given["seed"]}
    if issubclass(kind, ImageData):
        per_channel = {name: _listed(given.get(name, 0.5)) for name in ("mean", "std")}
        return {"kind": "images", **told, **per_channel, "channels": given.get("channels", 3)}
    tokenizer: Any = model.tokenizer()
    if issubclass(kind, ClassificationData):
        told |= {name: given[name] for name in ("max_length", "text_field", "label_field")}
        told |= {"pad": pad_token_id(tokenizer)}
        told |= {"label_names": None if given["labels"] is None else read_label_names(given["labels"])}
        if given["prompt"] is None:
            return {"kind": "labelled", **told}
        return {"kind": "prompted", **told, "prompt": given["prompt"], "label_words": given["label_words"]}
    told |= {"pad": pad_token_id(tokenizer), "eos": tokenizer.eos_token_id}
    return {"kind": "blocks", **told, "sequence_length": given["sequence_length"]} | (
        {"text_field": given["text_field"]} if "text_field" in given else {}
    )


def _class(section: Any) -> Any:
    if not isinstance(section, Mapping) or not isinstance(section.get("class_path"), str):
        return None
    module, _, name = section["class_path"].rpartition(".")
    kind = getattr(import_module(module), name, None) if module else None
    known = (TextData, DocstringData, ClassificationData, ImageData)
    return kind if isinstance(kind, type) and issubclass(kind, known) else None


def _listed(value: Any) -> list[float]:
    return [float(one) for one in (value if isinstance(value, list | tuple) else [value])]
