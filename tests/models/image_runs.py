"""Random images with stripes that tell their class, and where a model is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hosfl_lightning.data import FederatedDataModule


class Picture(NamedTuple):
    """An image (C, H, W) fp32 and its class."""

    pixel_values: Tensor
    labels: int


class RandomImages(FederatedDataModule):
    """Clients with unequal numbers of noisy images: horizontal stripes in odd classes, vertical ones in even."""

    def __init__(self, size: int = 8, channels: int = 1, classes: int = 2) -> None:
        super().__init__(batch_size=4, eval_batch_size=4)
        self.size, self.channels, self.classes = size, channels, classes

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        stripes = torch.ones(self.size, self.size)
        stripes[::2] = -1

        def picture(label: int) -> Picture:
            noise = torch.randn(self.channels, self.size, self.size, generator=generator)
            return Picture(noise + (stripes if label % 2 else stripes.T), label)

        self.clients = [[picture(i % self.classes) for i in range(count)] for count in (6, 3, 4)]
        self.validation_set = [picture(i % self.classes) for i in range(8)]

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        pixel_values = torch.stack([example.pixel_values for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example.labels for example in examples])}


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """A server's optimizer."""
    return lambda params: torch.optim.SGD(params, lr=lr)


def saved(model: Any, folder: Path) -> str:
    """The folder in which the model is now, as a user's would be."""
    model.save_pretrained(folder)
    return str(folder)
