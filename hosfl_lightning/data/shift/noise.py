"""Sensors that add: another noise to every image, or the same pattern to all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.shift.contract import Sensor, Shift


@dataclass(frozen=True)
class Noise(Shift):
    """x' = x + σ·n, n ~ N(0, 1) for each pixel and image.

    An image has its noise once and for all: it was taken once. With `each_client` σ_k is uniform in (0, `std`).

    Args:
        std: σ, of pixels in [0, 1].
        each_client: As in `Shift`.

    Raises:
        ValueError: `std` is not above 0.
    """

    std: float = 0.2

    def __post_init__(self) -> None:
        _check_positive("std", self.std)

    @override
    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        std = self.std * (sensor.uniform(1) if self.each_client else 1)
        return pixels + std * sensor.normal_each(*pixels.shape[1:])


@dataclass(frozen=True)
class SensorPattern(Shift):
    """x' = x + a·p, p ~ N(0, 1) for each pixel, drawn once for a device: every image of it has the same.

    Args:
        strength: a, of pixels in [0, 1].
        each_client: As in `Shift`; every client has a pattern of its own, of equal strength.

    Raises:
        ValueError: `strength` is not above 0.
    """

    strength: float = 0.3

    def __post_init__(self) -> None:
        _check_positive("strength", self.strength)

    @override
    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        return pixels + self.strength * sensor.normal(*pixels.shape[1:])


def _check_positive(setting: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"shift: {setting}={value}: must be above 0")
