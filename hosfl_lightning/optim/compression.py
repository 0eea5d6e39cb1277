"""What of a known gradient travels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from hosfl_lightning.optim.basis import DIRECTIONS, Basis, Dense, SharedDirections
from hosfl_lightning.optim.coordinates import Coordinates


@dataclass(frozen=True)
class Compression(ABC):
    """The basis of each round, for a client that knows its gradient and only has to send it."""

    @abstractmethod
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """The round's basis.

        Args:
            seed: The run's seed.
            round: Counted from 0.
            sizes: Elements of each trained tensor, in manifest order.

        Raises:
            ValueError: More coefficients than the client trains.
        """


@dataclass(frozen=True)
class Uncompressed(Compression):
    """The gradient itself, 4 bytes a trained value: `Dense`."""

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        return Dense(sizes)


@dataclass(frozen=True)
class RandomProjections(Compression):
    """``m`` random projections of the gradient, ``ĝ = (1/m) Σ_p ⟨g, u_p⟩ u_p``: `SharedDirections`.

    Args:
        count: ``m``, 1..4096, at most the number of trained values.
        distribution: ``rademacher`` or ``gauss16``.

    Raises:
        ValueError: A setting is out of range.
    """

    count: int = 1024
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= DIRECTIONS:
            raise ValueError(f"compression.count must be at least 1 and at most {DIRECTIONS}, got {self.count}")
        SharedDirections(0, 0, self.count, self.distribution)  # refuses an unknown distribution

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        _check_fewer(self.count, sizes)
        return SharedDirections(seed, round, self.count, self.distribution)


@dataclass(frozen=True)
class RandomSubset(Compression):
    """``m`` coordinates, others every round: `Coordinates`.

    Args:
        count: ``m``, at most the number of trained values.

    Raises:
        ValueError: ``m`` is out of range.
    """

    count: int = 1024

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"compression.count must be at least 1, got {self.count}")

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        _check_fewer(self.count, sizes)
        return Coordinates(seed, round, sizes, self.count)


def _check_fewer(count: int, sizes: Sequence[int]) -> None:
    if count > sum(sizes):
        raise ValueError(f"compression.count={count}: the client trains {sum(sizes)} values, which fewer numbers tell "
                         "exactly; lower it, or take Uncompressed")  # fmt: skip
