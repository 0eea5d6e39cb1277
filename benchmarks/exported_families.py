"""How well exported halves of many families agree with PyTorch: tiny random models, LoRA on all, of images the norms.

    python -m benchmarks.exported_families [--quantize int8] [--only llama gpt2]

prints a table, from the repository's root: the models are those of the tests.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hosfl_lightning.device.export import export_client
from hosfl_lightning.models import SplitCausalLM, SplitImageClassifier, SplitModule, SplitSequenceClassifier
from hosfl_lightning.models.pretrained import quiet_loading
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.split import Lora, LoraHalf, SplitError
from tests.split.tiny_images import CLASSES, PRETRAINED, tiny_image_model
from tests.split.tiny_models import CAUSAL, ENCODERS, tiny_model

HALF = LoraHalf(r=2, target_modules="all-linear")
LORA = Lora(client=HALF, server=HALF)
VISION_TRANSFORMERS = ("ViT", "DeiT", "Beit", "Dinov2", "Data2VecVision")


def main() -> None:
    """One row a family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--only", nargs="+", choices=[*families()])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | max relative Δz | probes' correlation |\n|---|---|---|")
    for name, make in families().items():
        if given.only is None or name in given.only:
            with tempfile.TemporaryDirectory() as folder, quiet_loading():
                print(f"| {name} | {told(make(Path(folder)), Path(folder), given.quantize)} |", flush=True)


def told(model: SplitModule, folder: Path, quantize: Any) -> str:
    """What was measured, or why it was refused."""
    try:
        figures = export_client(model, str(folder / "phone.onnx"), quantize).figures
    except SplitError as error:
        return f"refused: {error} |"
    probes = "–" if figures["probes"] is None else f"{figures['probes']:.4f}"
    return f"{max(relative for _, _, relative in figures['z']):.1e} | {probes}"


def families() -> dict[str, Callable[[Path], SplitModule]]:
    """What makes each, and saves it in a folder."""
    made: dict[str, Callable[[Path], SplitModule]] = {name: _causal(name) for name in CAUSAL}
    made |= {name: _classifier(name) for name in ENCODERS}
    made |= {name: _images(name) for name in PRETRAINED}
    return made | {"ConvNet": _digits}


def _saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder / "whole")
    return str(folder / "whole")


def _causal(name: str) -> Callable[[Path], SplitModule]:
    return lambda folder: SplitCausalLM(
        _saved(tiny_model(name, AutoModelForCausalLM), folder), cut=2, lora=LORA, part="client"
    )


def _classifier(name: str) -> Callable[[Path], SplitModule]:
    return lambda folder: SplitSequenceClassifier(
        _saved(tiny_model(name, AutoModelForSequenceClassification, num_labels=3), folder),
        cut=2, num_labels=3, lora=LORA, part="client",
    )  # fmt: skip


def _images(name: str) -> Callable[[Path], SplitModule]:
    trained: dict[str, Any] = {"lora": LORA} if name in VISION_TRANSFORMERS else {"client_parameters": "norm"}
    return lambda folder: SplitImageClassifier(
        2, CLASSES, 32, pretrained=_saved(tiny_image_model(name), folder), part="client", **trained
    )


def _digits(folder: Path) -> SplitModule:
    """As recipes/vision/digits_hosfl.yaml."""
    return SplitImageClassifier(2, 10, 8, 1, network=lambda: ConvNet(1, (8, 16, 32), 10, 8), part="client")


if __name__ == "__main__":
    main()
