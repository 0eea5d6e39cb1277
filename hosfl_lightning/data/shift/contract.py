"""What a shift is told, what it must return, and the check of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hosfl_lightning.rng import Domain, Stream, permutation, uniform16
from hosfl_lightning.rng.distributions import gauss16_table

#: Images that a shift is given at once.
CHUNK = 256
#: Number of the first example of a split, so that no two of them share the noise of an example.
FIRST = {"train": 0, "validation": 1 << 30, "test": 1 << 31}
IMAGES = "a Shift turns pixels (B, C, H, W) in [0, 1] and a Sensor into finite pixels of the same shape"
TEXTS = "a TextShift turns a text and a Sensor into a text"


@dataclass(frozen=True)
class Sensor:
    """A client's device: random numbers that are a function of (seed, client), or of that and an example's number.

    The package's own generator makes them; no global random state is read or changed.

    Args:
        client: Its number; 0 where all clients have one device.
        seed: The data's seed.
        examples: Numbers, in all of the data, of the B examples that it looks at.
    """

    client: int
    seed: int
    examples: tuple[int, ...] = ()

    def uniform(self, *shape: int) -> Tensor:
        """Of the device: fp32 in (0, 1), the same at every call."""
        return self._uniform(shape, 0)

    def normal(self, *shape: int) -> Tensor:
        """Of the device: standard normal fp32, the same at every call."""
        return _normal(self.uniform(*shape))

    def order(self, n: int) -> list[int]:
        """Of the device: 0..n-1 in an order of its own."""
        return permutation(n, self.seed, Domain.SHIFT, client=self.client).tolist()

    def uniform_each(self, *shape: int) -> Tensor:
        """Of each example: fp32 in (0, 1), (B, *shape)."""
        return torch.stack([self._uniform(shape, 1 + number) for number in self.examples])

    def normal_each(self, *shape: int) -> Tensor:
        """Of each example: standard normal fp32, (B, *shape)."""
        return _normal(self.uniform_each(*shape))

    def _uniform(self, shape: Sequence[int], round: int) -> Tensor:
        stream = Stream(self.seed, Domain.SHIFT, round=round, client=self.client)
        return uniform16(stream, 0, torch.Size(shape).numel()).view(*shape)


def _normal(uniform: Tensor) -> Tensor:
    """By the table of the random directions: the 65,536 values are the same bits everywhere."""
    return gauss16_table(torch.device("cpu"))[(uniform * 65536).long()]


@dataclass(frozen=True)
class _EachClient:
    """The setting that all shifts have.

    Args:
        each_client: Every client draws a device of its own from the data's seed and its number. False: one for all.
    """

    each_client: bool = field(default=False, kw_only=True)

    def sensor(self, client: int, seed: int, examples: Sequence[int]) -> Sensor:
        """What looks at a client's examples."""
        return Sensor(client if self.each_client else 0, seed, tuple(examples))


@dataclass(frozen=True)
class Shift(_EachClient, ABC):
    """x' = s_k(x): images through the sensor of client k, which no model was trained on.

    A subclass is a frozen dataclass whose fields are its settings, and a pure function: what is random comes from the
    sensor. What it returns is clipped to [0, 1] and stored with 8 bits, as a device would.

    Example::

        @dataclass(frozen=True)
        class Dusk(Shift):
            def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
                return pixels * sensor.uniform(1)
    """

    @abstractmethod
    def __call__(self, pixels: Tensor, sensor: Sensor) -> Tensor:
        """Look at images.

        Args:
            pixels: (B, C, H, W) fp32 in [0, 1], of one client.
            sensor: Its number (`client`) and random numbers.

        Returns:
            Pixels of the same shape, clipped by who asks.
        """


@dataclass(frozen=True)
class TextShift(_EachClient, ABC):
    """x' = s_k(x): a text as client k writes it. A subclass is as one of `Shift`."""

    @abstractmethod
    def __call__(self, text: str, sensor: Sensor) -> str:
        """Change a text, of one client; `sensor` has one example."""


def seen(
    shift: Shift, images: Sequence[Tensor], clients: Sequence[int], seed: int, split: str, first: int = 0
) -> list[Tensor]:
    """Images through the sensors of their clients.

    Args:
        shift: Checked to be one.
        images: uint8 (C, H, W), each of any size.
        clients: Through whose sensor each is seen.
        seed: The data's seed.
        split: `train`, `validation` or `test`.
        first: Number of the first image within the split.

    Returns:
        uint8 of the same shapes.

    Raises:
        ValueError: If the shift breaks its contract; names its class.
    """
    groups: dict[tuple[int, torch.Size], list[int]] = {}
    for place, (image, client) in enumerate(zip(images, clients)):
        groups.setdefault((client, image.shape), []).append(place)
    found = list(images)
    for (client, _), places in groups.items():
        for start in range(0, len(places), CHUNK):
            some = places[start : start + CHUNK]
            pixels = torch.stack([images[place] for place in some]).float() / 255
            sensor = shift.sensor(client, seed, [FIRST[split] + first + place for place in some])
            for place, image in zip(some, _stored(shift, pixels, shift(pixels.clone(), sensor))):
                found[place] = image
    return found


def _stored(shift: Shift, pixels: Tensor, given: object) -> Tensor:
    name = type(shift).__name__
    if not isinstance(given, Tensor) or given.shape != pixels.shape or not given.is_floating_point():
        what = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"shift: {name} turns {tuple(pixels.shape)} into {what}; {IMAGES}")
    if not given.isfinite().all():
        raise ValueError(f"shift: {name} returns pixels that are no numbers; {IMAGES}")
    return (given.float().clamp(0, 1) * 255).round().to(torch.uint8)


def heard(shift: TextShift, text: str, client: int, seed: int, split: str, number: int) -> str:
    """A text as a client writes it.

    Args:
        shift: Checked to be one.
        text: As it is.
        client: Whose it is.
        seed: The data's seed.
        split: `train`, `validation` or `test`.
        number: Of the text within the split.

    Raises:
        ValueError: If the shift breaks its contract; names its class.
    """
    given = shift(text, shift.sensor(client, seed, [FIRST[split] + number]))
    if not isinstance(given, str):
        raise ValueError(f"shift: {type(shift).__name__} returns a {type(given).__name__}; {TEXTS}")
    return given
