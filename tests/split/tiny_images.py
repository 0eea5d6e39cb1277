"""Tiny random-init image classifiers of every family that must split exactly. Built from configs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from hosfl_lightning.networks import ConvNet

CLASSES = 5
_MAPS: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_TOKENS: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

_WINDOWS: dict[str, Any] = {
    "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [2, 2, 2], "window_size": 4, "image_size": 32, "patch_size": 2,
}  # fmt: skip

# Architecture: its config, and what differs from the common settings.
PRETRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet": ("resnet", {**_MAPS, "layer_type": "basic"}),
    "MobileNetV2": ("mobilenet_v2", {"depth_multiplier": 0.35}),
    "ViT": ("vit", _TOKENS),
    "DeiT": ("deit", _TOKENS),
    "Beit": ("beit", {**_TOKENS, "use_mean_pooling": False, "layer_scale_init_value": 0.5}),
    "Dinov2": ("dinov2", _TOKENS),
    "RegNet": ("regnet", {**_MAPS, "groups_width": 8}),
    "ConvNext": ("convnext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "Bit": ("bit", {**_MAPS, "num_groups": 4, "hidden_sizes": [32, 32, 48, 64]}),
    "Segformer": ("segformer", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "decoder_hidden_size": 16}),
    "Swin": ("swin", _WINDOWS),
    "Swinv2": ("swinv2", _WINDOWS),
    "Data2VecVision": ("data2vec-vision", {**_TOKENS, "use_mean_pooling": False}),
}
SEQUENTIAL: dict[str, Callable[[], nn.Sequential]] = {
    "ConvNet": lambda: ConvNet(3, (8, 8, 16), CLASSES, 32),
    # The server's first layer works in place, on a vector and on a map.
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)
    ),
    "one_channel": lambda: nn.Sequential(
        nn.Conv2d(3, 1, 4, 4), nn.BatchNorm2d(1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, CLASSES)
    ),
}
MODELS = [*PRETRAINED, *SEQUENTIAL]


def tiny_image_model(name: str, noise: float = 0.2) -> Any:
    """A classifier of images (3, 32, 32) in eval mode; norms and their statistics are random too, or none would show.

    Args:
        name: One of ``MODELS``.
        noise: How random; 0 leaves a model that can be trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = SEQUENTIAL[name]() if name in SEQUENTIAL else _pretrained(name)
        for tensor in [p.detach() for p in model.parameters()] + [b for b in model.buffers() if b.is_floating_point()]:
            tensor.add_(torch.rand_like(tensor), alpha=noise)
    return model.eval()


def _pretrained(name: str) -> Any:
    config, settings = PRETRAINED[name]
    return getattr(transformers, f"{name}ForImageClassification")(
        transformers.AutoConfig.for_model(config, num_labels=CLASSES, **settings)
    )


def images(count: int = 3) -> torch.Tensor:
    """Seeded images (count, 3, 32, 32)."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
