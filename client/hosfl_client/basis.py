"""In what an update is expressed: coefficients in a basis that every side can rebuild."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hosfl_client.bfloat16 import Array, Floats, cast, widen
from hosfl_client.rng import DISTRIBUTIONS, Domain, Stream, permutation, round_coefficients, sums
from hosfl_client.rng.directions import ELEMENTS, drawn_words
from hosfl_client.rng.distributions import expand

#: Directions of a basis at most.
DIRECTIONS = 1 << 12

Chunk = tuple[int, slice, Floats]
"""A tensor's number, some of its flat elements, and their values, which may be overwritten."""


class Basis(ABC):
    """``ĝ = reconstruct(c)``: an update as ``size`` coefficients ``c`` in a basis ``b_1..b_size``.

    Tensors are named by their position in the manifest: the client's trained tensors in order.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of coefficients, the scalars that travel."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a receiver needs beside the coefficients; JSON types only."""

    @abstractmethod
    def chunks(self, coefficients: Floats, sizes: Sequence[int]) -> Iterator[Chunk]:
        """``ĝ`` chunk by chunk, each element once, in scratch of less than 1 MiB; a chunk is valid until the next.

        Args:
            coefficients: ``(size,)``.
            sizes: Elements of each tensor, in manifest order.
        """

    @abstractmethod
    def project(self, gradient: Sequence[Floats]) -> Floats:
        """Coefficients of a known gradient, ``(size,)`` fp32: ``reconstruct(project(g))`` estimates ``g``.

        Args:
            gradient: fp32, one a tensor in manifest order; empty where nothing is known.
        """


class SharedDirections(Basis):
    r"""``ĝ = (1/P) Σ_p c_p u_p``, the same random directions ``u_p`` for every client of a round.

    Args:
        seed: The run's 64-bit seed.
        round: Counted from 0.
        probes: ``P``, 1..4096.
        distribution: ``rademacher`` (signs) or ``gauss16`` (normal, 16 bits an element).

    Raises:
        ValueError: A setting is out of range.

    Reference: HO-SFL, arXiv 2603.14773; scalars with shared seeds: DeComFL, arXiv 2405.15861.
    """

    def __init__(self, seed: int, round: int, probes: int, distribution: str = "rademacher") -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
        if not 1 <= probes <= DIRECTIONS:
            raise ValueError(f"probes must be between 1 and {DIRECTIONS}, got {probes}")
        self.distribution = distribution
        self.domain = DISTRIBUTIONS[distribution]
        self.streams = [Stream(seed, self.domain, round, probe=p) for p in range(probes)]

    @property
    def size(self) -> int:
        """``P``."""
        return len(self.streams)

    def part(self, first: int, probes: int) -> SharedDirections:
        """Directions ``first .. first + probes − 1`` alone, with the bits that they have among all."""
        part = copy(self)
        part.streams = self.streams[first : first + probes]
        return part

    def of_client(self, client: int) -> SharedDirections:
        """As many directions that are that client's own."""
        own = copy(self)
        own.streams = [replace(stream, client=client) for stream in self.streams]
        return own

    def describe(self) -> dict[str, Any]:
        """As `Basis.describe`."""
        return {"kind": "shared_directions", "probes": self.size, "distribution": self.distribution}

    def chunks(self, coefficients: Floats, sizes: Sequence[int]) -> Iterator[Chunk]:
        """As `Basis.chunks`."""
        alphas = round_coefficients(coefficients / np.float32(self.size), self.domain).tolist()
        for tensor, start, total in sums(self.streams, alphas, _whole(sizes)):
            total += np.float32(0)  # the sum begins at zero: it is never −0
            yield tensor, slice(start, start + len(total)), total

    def perturb(self, parameters: Sequence[Array], probe: int, scale: float, out: Sequence[Array | None]) -> None:
        """``out_i ← cast(fp32(θ_i) + scale · u_probe)``.

        Args:
            parameters: θ, contiguous, fp32, bf16 or fp16.
            probe: Which direction.
            scale: ``±μ``, rounded by `round_coefficient`.
            out: Contiguous, of the shapes and dtypes of ``parameters``; may be they themselves. None: that tensor
                does not move.
        """
        moved = [(tensor, array) for tensor, array in enumerate(out) if array is not None]
        assert all(array.flags.c_contiguous for _, array in moved)
        flat = {tensor: (parameters[tensor].reshape(-1), array.reshape(-1)) for tensor, array in moved}
        pieces = [(tensor, 0, array.size) for tensor, array in moved]
        for i, start, u in sums([self.streams[probe]], [scale], pieces):
            theta, target = (array[start : start + len(u)] for array in flat[pieces[i][0]])
            if theta.dtype == np.float32:
                np.add(theta, u, out=target)
            else:
                cast(np.add(widen(theta), u, out=u), target)

    def project(self, gradient: Sequence[Floats]) -> Floats:
        """``⟨g, u_p⟩``, summed in fp64."""
        flat = [g.reshape(-1) for g in gradient]
        pieces = [(tensor, 0, g.size) for tensor, g in enumerate(flat)]
        totals = np.zeros(self.size)
        u, wide = np.empty(ELEMENTS, np.float32), np.zeros(ELEMENTS)
        for runs, begin, end, drawn in drawn_words(self.streams, pieces):
            n = end - begin << runs.log2
            wide[:n] = 0
            for tensor, start, place in runs.split(begin, end, wide[:n]):
                place[:] = flat[tensor][start : start + len(place)]
            for first, words in drawn:
                for probe, own in enumerate(words, first):
                    totals[probe] += np.multiply(wide[:n], expand(own, self.domain, 1.0, u[:n])).sum()
        return totals.astype(np.float32)


class Dense(Basis):
    """``ĝ = c``: the gradient itself, flattened in manifest order.

    Args:
        sizes: Elements of each tensor, in manifest order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.starts = [0, *accumulate(sizes)]

    @property
    def size(self) -> int:
        """Elements of all tensors."""
        return self.starts[-1]

    def describe(self) -> dict[str, Any]:
        """As `Basis.describe`."""
        return {"kind": "dense"}

    def chunks(self, coefficients: Floats, sizes: Sequence[int]) -> Iterator[Chunk]:
        """As `Basis.chunks`."""
        for tensor, piece in _pieces(sizes):
            begin = self.starts[tensor]
            yield tensor, piece, coefficients[begin + piece.start : begin + piece.stop] + np.float32(0)

    def project(self, gradient: Sequence[Floats]) -> Floats:
        """As `Basis.project`."""
        return np.concatenate([g.reshape(-1) for g in gradient], dtype=np.float32)


class Coordinates(Basis):
    r"""``ĝ = (d/m) Σ_{i∈S} c_i e_i``, ``c_i = g_i``: ``m`` of ``d`` coordinates, the same for every client of a round.

    Args:
        seed: The run's 64-bit seed.
        round: Counted from 0.
        sizes: Elements of each tensor, in manifest order.
        count: ``m``, 1 .. d.

    Raises:
        ValueError: ``m`` is out of range.

    Reference: Konečný et al., Federated Learning: Strategies for Improving Communication Efficiency, arXiv 1610.05492,
    random masks.
    """

    def __init__(self, seed: int, round: int, sizes: Sequence[int], count: int) -> None:
        self.starts = [0, *accumulate(sizes)]
        total = self.starts[-1]
        if not 1 <= count <= total:
            raise ValueError(f"count must be between 1 and the {total} trained values of the client, got {count}")
        self.count, self.scale = count, np.float32(total / count)
        self._drawn = total, seed, round

    @cached_property
    def chosen(self) -> npt.NDArray[np.int64]:
        """``S``, ascending."""
        total, seed, round = self._drawn
        return np.sort(permutation(total, seed, Domain.COORDINATES, round=round)[: self.count])

    @property
    def size(self) -> int:
        """``m``."""
        return self.count

    def describe(self) -> dict[str, Any]:
        """As `Basis.describe`."""
        return {"kind": "coordinates", "count": self.size}

    def chunks(self, coefficients: Floats, sizes: Sequence[int]) -> Iterator[Chunk]:
        """As `Basis.chunks`."""
        for tensor, piece in _pieces(sizes):
            begin, total = self.starts[tensor] + piece.start, np.zeros(piece.stop - piece.start, np.float32)
            first, last = np.searchsorted(self.chosen, [begin, begin + len(total)])
            total[self.chosen[first:last] - begin] += coefficients[first:last] * self.scale
            yield tensor, piece, total

    def project(self, gradient: Sequence[Floats]) -> Floats:
        """As `Basis.project`."""
        return np.concatenate([g.reshape(-1) for g in gradient], dtype=np.float32)[self.chosen]


class Beside(Basis):
    r"""``ĝ = (reconstruct(c_1..c_P), c_{P+1}..)``: the first tensors in a basis of theirs, the last ones as they are.

    Args:
        first: Of the first tensors.
        sizes: Elements of each tensor, in manifest order.
        last: How many of them, >= 1, are behind the first ones.
    """

    def __init__(self, first: Basis, sizes: Sequence[int], last: int) -> None:
        self.first, self.last, self.tensors = first, Dense(sizes[len(sizes) - last :]), len(sizes) - last

    @property
    def size(self) -> int:
        """Of both."""
        return self.first.size + self.last.size

    def describe(self) -> dict[str, Any]:
        """As `Basis.describe`."""
        return {**self.first.describe(), "beside": len(self.last.starts) - 1}

    def chunks(self, coefficients: Floats, sizes: Sequence[int]) -> Iterator[Chunk]:
        """As `Basis.chunks`."""
        yield from self.first.chunks(coefficients[: self.first.size], sizes[: self.tensors])
        for tensor, piece, total in self.last.chunks(coefficients[self.first.size :], sizes[self.tensors :]):
            yield self.tensors + tensor, piece, total

    def project(self, gradient: Sequence[Floats]) -> Floats:
        """As `Basis.project`."""
        known = self.first.project(gradient[: self.tensors]), self.last.project(gradient[self.tensors :])
        return np.concatenate(known)


_KINDS: dict[str, Callable[..., Basis]] = {
    "shared_directions": SharedDirections, "coordinates": Coordinates, "dense": Dense, "beside": Beside,
}  # fmt: skip
B = TypeVar("B")


def basis_of(description: Mapping[str, Any], seed: int, round: int, sizes: Sequence[int]) -> Basis:
    """The basis whose `Basis.describe` gave ``description``; see `described`."""
    return described(description, seed, round, sizes, _KINDS)


def described(
    description: Mapping[str, Any], seed: int, round: int, sizes: Sequence[int], kinds: Mapping[str, Callable[..., B]]
) -> B:
    """The basis of an engine whose ``describe`` gave ``description``.

    Args:
        description: ``kind`` and that kind's settings, as a message carries them; ``beside``: of how many tensors at
            the end the gradient itself follows.
        seed: The run's seed; it does not travel.
        round: In which the coefficients were measured.
        sizes: Elements of each tensor, in manifest order.
        kinds: The engine's classes, by kind.

    Raises:
        ValueError: An unknown kind, or settings that are not that kind's, of another type or out of range.
    """
    settings = {name: value for name, value in description.items() if name not in ("kind", "beside")}
    if "beside" in description:
        last, own = description["beside"], {name: value for name, value in description.items() if name != "beside"}
        _check_type("beside", last, int)
        if not 0 < last < len(sizes):
            raise ValueError(f"basis.beside must be in 1..{len(sizes) - 1}, some of the trained tensors, got {last}")
        return kinds["beside"](described(own, seed, round, sizes[: len(sizes) - last], kinds), sizes, last)
    match description.get("kind"), sorted(settings):
        case "shared_directions", ["distribution", "probes"]:
            _check_type("probes", settings["probes"], int)
            _check_type("distribution", settings["distribution"], str)
            return kinds["shared_directions"](seed, round, **settings)
        case "coordinates", ["count"]:
            _check_type("count", settings["count"], int)
            return kinds["coordinates"](seed, round, sizes, **settings)
        case "dense", []:
            return kinds["dense"](sizes)
    raise ValueError(
        f"no basis is described by {dict(description)}: kind must be shared_directions (with probes, distribution), "
        "coordinates (with count) or dense; a later version may know it"
    )


def _check_type(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"basis.{name} must be of type {kind.__name__}, got {value!r:.80}")


def _whole(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(tensor, 0, size) for tensor, size in enumerate(sizes)]


def _pieces(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    for tensor, size in enumerate(sizes):
        for start in range(0, size, ELEMENTS):
            yield tensor, slice(start, min(start + ELEMENTS, size))
