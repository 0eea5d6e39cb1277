"""Tiny models of several families, exported, and PyTorch's half beside each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hosfl_client.manifest import Manifest
from hosfl_lightning.device.export import export_client
from hosfl_lightning.models import SplitCausalLM, SplitImageClassifier, SplitModule, SplitSequenceClassifier
from hosfl_lightning.split import Lora, LoraHalf, Side
from tests.models.image_runs import saved
from tests.split.tiny_images import CLASSES, tiny_image_model
from tests.split.tiny_models import tiny_model


@dataclass(frozen=True)
class Exported:
    """A model and what was written of it."""

    model: SplitModule
    path: Path
    manifest: Manifest


def exported(model: SplitModule, folder: Path, **kwargs: Any) -> Exported:
    """Written, with trained tensors that are not zero: else half of them would not show."""
    with torch.no_grad():
        for i, parameter in enumerate(model.client_parameters.values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
    path = folder / "phone.onnx"
    return Exported(model, path, export_client(model, str(path), **kwargs))


def lora(*targets: str) -> Lora:
    """Of both halves."""
    return Lora(client=LoraHalf(r=2, target_modules=list(targets)), server=LoraHalf(r=2, target_modules=list(targets)))


def _causal(family: str, *targets: str, **settings: Any) -> Callable[[Path], SplitModule]:
    def make(folder: Path) -> SplitModule:
        whole = tiny_model(family, AutoModelForCausalLM, **settings)
        return SplitCausalLM(saved(whole, folder), cut=1, lora=lora(*targets), part="client")

    return make


def _bert(folder: Path) -> SplitModule:
    whole = tiny_model("bert", AutoModelForSequenceClassification, num_labels=3)
    return SplitSequenceClassifier(saved(whole, folder), cut=1, num_labels=3, lora=lora("query"), part="client")


def _resnet(folder: Path) -> SplitModule:
    whole = saved(tiny_image_model("ResNet"), folder)
    return SplitImageClassifier(1, CLASSES, 32, pretrained=whole, client_parameters="norm", part="client")


def with_side(folder: Path) -> SplitModule:
    """LoRA and a side adapter on both layers of a Llama."""
    whole = saved(tiny_model("llama", AutoModelForCausalLM), folder)
    side = Side(client=4, taps="all")
    return SplitCausalLM(whole, cut=2, lora=lora("q_proj", "down_proj"), side=side, part="client")


MODELS: dict[str, Callable[[Path], SplitModule]] = {
    "gpt2": _causal("gpt2", "c_attn"),
    "qwen3": _causal("qwen3", "v_proj"),
    "bert": _bert,
    "resnet": _resnet,
}
