"""In what a client's update is expressed: coefficients in a basis that every side can rebuild."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.rng import DISTRIBUTIONS, DirectionBatch, Stream, add_direction_, round_coefficient

#: Tensors up to this size are drawn together, one generator call a probe, instead of one call each.
SMALL = 1 << 16
#: Elements of fp32 scratch that an update or a projection may use at a time (2 MiB).
CHUNK = 1 << 19
#: Directions of a basis at most.
DIRECTIONS = 1 << 12
#: Elements that torch sums on one thread (its grain size is 32,768), whatever the number of threads.
SERIAL = 1 << 14

Piece = tuple[int, int, int]
"""A run of elements of one tensor: ``(tensor, start, stop)``."""


def buckets(sizes: Sequence[int]) -> list[list[Piece]]:
    """Cut the elements of all tensors into buckets of at most ``CHUNK``; small tensors stay whole and share a bucket.

    Args:
        sizes: Elements of each tensor, in manifest order.

    Returns:
        Buckets that together hold every element exactly once.
    """
    cut: list[list[Piece]] = []
    together: list[Piece] = []
    free = CHUNK
    for tensor, size in enumerate(sizes):
        if size > SMALL:
            cut += [[(tensor, start, min(start + CHUNK, size))] for start in range(0, size, CHUNK)]
            continue
        if size > free:
            cut.append(together)
            together, free = [], CHUNK
        together.append((tensor, 0, size))
        free -= size
    return [*cut, together] if together else cut


class Basis(ABC):
    """``ĝ = reconstruct(c)``: an update as ``size`` coefficients ``c`` in a basis ``b_1..b_size``.

    Estimators return coefficients, messages carry them, the update rule consumes their expansion chunk by chunk.
    Tensors are named by their position in the manifest: the trainable client tensors in ``named_parameters()`` order.
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of coefficients, the scalars that travel."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a receiver needs beside the coefficients; JSON types only."""

    @abstractmethod
    def expand_(self, out: Sequence[Tensor], coefficients: Tensor, pieces: Sequence[Piece]) -> None:
        """``out_i += ĝ[piece_i]``, in place.

        Args:
            out: One contiguous 1-D fp32 tensor a piece.
            coefficients: ``(size,)`` fp32.
            pieces: Which elements the tensors of ``out`` stand for, all of one bucket.
        """

    @abstractmethod
    def project(self, gradient: Sequence[Tensor]) -> Tensor:
        """Coefficients of a known gradient, ``(size,)`` fp32: ``reconstruct(project(g))`` estimates ``g``."""

    def of_clients(self, clients: Sequence[int]) -> Basis:
        """In what these clients answer λ, each alone, and what is made of their answers: itself, if it is nobody's."""
        return self

    def chunks(self, parameters: Sequence[Tensor], coefficients: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """``ĝ`` piece by piece: ``(tensor, its flat elements, fp32 values)``, in scratch of one bucket at a time."""
        for pieces in buckets([p.numel() for p in parameters]):
            sums = [_zeros(stop - start, parameters[tensor].device) for tensor, start, stop in pieces]
            self.expand_(sums, coefficients, pieces)
            for (tensor, start, stop), total in zip(pieces, sums):
                yield tensor, slice(start, stop), total

    def apply(self, parameters: Sequence[Tensor], coefficients: Tensor, alpha: float) -> None:
        """``θ += α · ĝ`` for contiguous parameters of any float dtype (the sum is in fp32, then cast)."""
        for tensor, piece, total in self.chunks(parameters, coefficients):
            flat = parameters[tensor].detach().view(-1)[piece]
            flat.copy_(flat.float().add_(total.mul_(alpha)))


class SharedDirections(Basis):
    r"""``ĝ = (1/P) Σ_p c_p u_p``, the same random directions ``u_p`` for every client of a round.

    The directions follow from ``(seed, round, p)`` alone, so neither they nor a seed travel: a round is ``P`` scalars
    whatever the model's size. For directions with ``E[u uᵀ] = I`` and ``c_p = ⟨g, u_p⟩`` the mean of ``ĝ`` is ``g``.

    Args:
        seed: The run's 64-bit seed.
        round: Counted from 0.
        probes: ``P``, 1..4096.
        distribution: ``rademacher`` (signs) or ``gauss16`` (normal, 16 bits an element).
        first_tensor: Number of the first tensor, 0 at a client; the server's are numbered after the client's.

    Reference: HO-SFL, arXiv 2603.14773; scalars with shared seeds: DeComFL, arXiv 2405.15861.
    """

    def __init__(
        self, seed: int, round: int, probes: int, distribution: str = "rademacher", first_tensor: int = 0
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
        if not 1 <= probes <= DIRECTIONS:
            raise ValueError(f"probes must be between 1 and {DIRECTIONS}, got {probes}")
        self.distribution = distribution
        self.domain = DISTRIBUTIONS[distribution]
        self.streams = [
            Stream(seed=seed, domain=self.domain, round=round, probe=p, first_tensor=first_tensor)
            for p in range(probes)
        ]

    @property
    @override
    def size(self) -> int:
        return len(self.streams)

    @property
    def probes(self) -> int:
        """``P``, over which the mean is."""
        return len(self.streams)

    def part(self, first: int, probes: int) -> SharedDirections:
        """Directions ``first .. first + probes − 1`` alone, with the bits that they have among all."""
        part = copy(self)
        part.streams = self.streams[first : first + probes]
        return part

    def after(self, tensors: int) -> SharedDirections:
        """The same directions for tensors that follow on so many others, which are numbered before them."""
        behind = copy(self)
        behind.streams = [replace(s, first_tensor=s.first_tensor + tensors) for s in self.streams]
        return behind

    def of_client(self, client: int) -> SharedDirections:
        """As many directions that are that client's own."""
        own = copy(self)
        own.streams = [replace(stream, client=client) for stream in self.streams]
        return own

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "shared_directions", "probes": self.size, "distribution": self.distribution}

    @override
    def expand_(self, out: Sequence[Tensor], coefficients: Tensor, pieces: Sequence[Piece]) -> None:
        alphas = round_coefficient(coefficients / self.probes, self.domain)
        for stream, alpha in zip(self.streams, alphas):
            add_pieces_(out, alpha, stream, pieces)

    @override
    def project(self, gradient: Sequence[Tensor]) -> Tensor:
        sizes = [g.numel() for g in gradient]
        totals = torch.zeros(self.size, dtype=torch.float64, device=gradient[0].device)
        for pieces in buckets(sizes):
            flat = torch.cat([gradient[t].reshape(-1)[start:stop] for t, start, stop in pieces]).double()
            for p, stream in enumerate(self.streams):
                u = _zeros(flat.numel(), flat.device)
                add_pieces_(u.split([stop - start for _, start, stop in pieces]), torch.ones_like(u[0]), stream, pieces)
                # Torch sums longer runs by parts, one a thread: the result would depend on their number.
                totals[p] += torch.stack([part.sum() for part in (flat * u).split(SERIAL)]).sum()
        return totals.float()


class Dense(Basis):
    """``ĝ = c``: the gradient itself, flattened in manifest order. What a first-order client answers.

    Args:
        sizes: Elements of each tensor, in manifest order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.starts = [0, *accumulate(sizes)]

    @property
    @override
    def size(self) -> int:
        return self.starts[-1]

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "dense"}

    @override
    def expand_(self, out: Sequence[Tensor], coefficients: Tensor, pieces: Sequence[Piece]) -> None:
        for target, (tensor, start, stop) in zip(out, pieces):
            target.add_(coefficients[self.starts[tensor] + start : self.starts[tensor] + stop])

    @override
    def project(self, gradient: Sequence[Tensor]) -> Tensor:
        return torch.cat([g.reshape(-1).float() for g in gradient])


def add_pieces_(out: Sequence[Tensor], alpha: Tensor, stream: Stream, pieces: Sequence[Piece]) -> None:
    """``out_i += α · u[piece_i]``; whole small tensors in one generator call, a chunk of a large one in its own."""
    if len(pieces) == 1:
        tensor, start, _ = pieces[0]
        add_direction_(out[0], alpha, stream, tensor, start)
        return
    batch = DirectionBatch(stream, [(tensor, stop) for tensor, _, stop in pieces], device=out[0].device)
    for i, target in enumerate(out):
        batch.add_(i, target, alpha)


def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.float32, device=device)
