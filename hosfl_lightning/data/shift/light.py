"""Sensors that see other light: contrast and colour."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.shift.contract import Sensor, Shift


@dataclass(frozen=True)
class Contrast(Shift):
    """x' = ½ + g·(x − ½) + o.

    With `each_client` |g_k| is uniform between half of |gain| and |gain|, its sign either where `gain` is negative, and
    o_k uniform between −`offset` and `offset`.

    Args:
        gain: g; −1 inverts, between 0 and 1 is dull.
        offset: o, in [−1, 1]: darker or brighter.
        each_client: As in `Shift`.

    Raises:
        ValueError: A setting is out of range.
    """

    gain: float = -1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.gain) or self.gain == 0:
            raise ValueError(f"shift: gain={self.gain}: must be a number other than 0; -1 inverts")
        if not -1 <= self.offset <= 1:
            raise ValueError(f"shift: offset={self.offset}: must lie in -1..1")

    @override
    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        gain, offset = self.gain, self.offset
        if self.each_client:
            size, sign, place = sensor.uniform(3).tolist()
            gain *= 0.5 + 0.5 * size
            gain = abs(gain) if sign < 0.5 else gain
            offset *= 2 * place - 1
        return 0.5 + gain * (pixels - 0.5) + offset


@dataclass(frozen=True)
class ColourCast(Shift):
    """x'_c = g_c·x_c + o_c for the channels c = red, green, blue.

    With `each_client` a client has the three pairs in an order of its own and t_k of their strength, t_k uniform in
    (0, 1): g_kc = 1 + t_k·(g_c − 1), o_kc = t_k·o_c.

    Args:
        gains: g, of red, green and blue.
        offsets: o, in [−1, 1].
        each_client: As in `Shift`.

    Raises:
        ValueError: A setting is out of range, or the images are grey (`data.init_args.channels: 3` repeats grey).
    """

    gains: tuple[float, float, float] = (1.0, 0.6, 0.3)
    offsets: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        for name, values in (("gains", self.gains), ("offsets", self.offsets)):
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"shift: {name}={values}: give three numbers, of red, green and blue")
        if not all(-1 <= value <= 1 for value in self.offsets):
            raise ValueError(f"shift: offsets={self.offsets}: must lie in -1..1")

    @override
    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        if pixels.shape[1] != 3:
            raise ValueError(
                "shift: ColourCast needs three channels; set data.init_args.channels (and the model's) to 3"
            )
        gains, offsets = torch.tensor(self.gains), torch.tensor(self.offsets)
        if self.each_client:
            order, strength = sensor.order(3), sensor.uniform(1)
            gains, offsets = 1 + strength * (gains[order] - 1), strength * offsets[order]
        return gains.view(3, 1, 1) * pixels + offsets.view(3, 1, 1)
