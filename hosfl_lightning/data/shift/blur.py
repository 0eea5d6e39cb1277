"""A sensor that is out of focus."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.shift.contract import Sensor, Shift

#: Widest blur; the kernel reaches three of them to each side.
LARGEST = 20.0


@dataclass(frozen=True)
class Blur(Shift):
    """x' = K_σ * x, a Gaussian of standard deviation σ, cut at 3σ; the image goes on as its border.

    With `each_client` σ_k is uniform in (0, `sigma`).

    Args:
        sigma: σ, in pixels.
        each_client: As in `Shift`.

    Raises:
        ValueError: `sigma` is not in (0, 20].
    """

    sigma: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= LARGEST:
            raise ValueError(f"shift: sigma={self.sigma}: must lie above 0 and be at most {LARGEST:g} pixels")

    @override
    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        sigma = self.sigma * (float(sensor.uniform(1)) if self.each_client else 1)
        reach = max(1, math.ceil(3 * sigma))
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        kernel = (weights / weights.sum()).view(1, 1, 1, -1)
        rows = pixels.reshape(-1, 1, *pixels.shape[2:])
        for turned in (kernel, kernel.transpose(2, 3)):
            sides = (reach, reach, 0, 0) if turned is kernel else (0, 0, reach, reach)
            rows = F.conv2d(F.pad(rows, sides, mode="replicate"), turned)
        return rows.view(pixels.shape)
