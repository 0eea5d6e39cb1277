"""The network that ``benchmarks.input_shift`` adapts: a ConvNet trained on clean Fashion-MNIST, a minute or two."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F

from benchmarks.input_shift_cells import DEALT, SIZE, WIDTHS
from hosfl_lightning.data import FashionMNISTData
from hosfl_lightning.data.partition import fixed_subset
from hosfl_lightning.files import write_whole
from hosfl_lightning.models.pretrained import seeded
from hosfl_lightning.networks import ConvNet


def pretrain(
    folder: str, channels: Literal[1, 3], out: Path, epochs: int = 4, batch_size: int = 128, lr: float = 0.004
) -> float:
    """Train on the training images that are neither dealt to clients nor held out, and write the weights.

    AdamW, the rate falling from `lr` to 0 as a cosine; order and start under seed 0.

    Args:
        folder: With the files of Fashion-MNIST.
        channels: 1, or 3 with grey repeated.
        out: The safetensors file.
        epochs: Passes over the images.
        batch_size: Images a step.
        lr: At the start.

    Returns:
        Accuracy on 2,000 clean validation images.
    """
    data = FashionMNISTData(folder, num_clients=1, channels=channels)
    data.setup("fit")
    [images] = data.clients
    dealt = set(fixed_subset(len(images), DEALT))
    batch = data.collate([image for place, image in enumerate(images) if place not in dealt])
    pixels, labels = batch["pixel_values"], batch["labels"]
    with seeded(0):
        network = ConvNet(channels, tuple(WIDTHS), data.label_set.count, SIZE)
        optimizer = torch.optim.AdamW(network.parameters(), lr)
        steps = epochs * (len(pixels) // batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            order = torch.randperm(len(pixels))
            for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
                loss = F.cross_entropy(network(pixels[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    write_whole(out, lambda file: file.write(safetensors.torch.save(network.state_dict())))
    clean = data.collate(data.validation_set[-2000:])
    with torch.no_grad():
        return float((network(clean["pixel_values"]).argmax(1) == clean["labels"]).float().mean())
