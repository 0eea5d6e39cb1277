"""Directions on the unit sphere: Gaussian ones, divided by their length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hosfl_lightning.optim.basis import CHUNK, SERIAL, SMALL, Piece, SharedDirections, add_pieces_
from hosfl_lightning.optim.estimators import Objective
from hosfl_lightning.optim.zeroth_order import ZerothOrder
from hosfl_lightning.rng import Domain, Stream, round_coefficient


@torch.no_grad()
def sphere_difference(
    objective: Objective, optimizer: ZerothOrder, basis: SharedDirections, mu: float, base: Tensor
) -> Tensor:
    r"""``ĝ = (d/μ)(f(θ + μ u) − f(θ)) u`` for ``u = g/‖g‖``, as coefficients of ``g``.

    ::

        c_p = (d/‖g_p‖²) (f(θ + μ'_p g_p) − f(θ)) / μ'_p,    ĝ = (1/P) Σ_p c_p g_p

    ``μ'_p = μ/‖g_p‖``, rounded as the distribution asks. ``E[d u uᵀ] = I``, so the mean of ``ĝ`` is the gradient, to
    ``O(μ)``. Whoever applies the coefficients needs no norm.

    Args:
        objective: ``f`` at the current parameters, 0-d.
        optimizer: Holds θ.
        basis: ``g_1 .. g_P``, of gauss16.
        mu: ``μ``.
        base: ``f(θ)``.

    Returns:
        ``(P,)``, fp64.

    Reference: HERON-SFL, arXiv 2601.09076, its estimator.
    """
    sizes = [p.numel() for p in optimizer.parameters]
    values = []
    for probe, stream in enumerate(basis.streams):
        square = squared_norm(stream, sizes, optimizer.device)
        scale = round_coefficient(mu / math.sqrt(square), Domain.GAUSS16)
        with optimizer.perturbed(basis, probe, scale):
            value = objective().double()
        values.append((value - base.double()) / scale * (sum(sizes) / square))
    return torch.stack(values)


def squared_norm(stream: Stream, sizes: Sequence[int], device: torch.device) -> float:
    """``‖g‖²``: the squares summed in fp64 in element order, whatever the chunks and the number of threads.

    Args:
        stream: Which direction.
        sizes: Elements of each tensor, in manifest order.
        device: Where the elements are drawn; they are summed on the host.
    """
    total = torch.zeros((), dtype=torch.float64)
    for pieces in in_order(sizes):
        lengths = [stop - start for _, start, stop in pieces]
        flat = torch.zeros(sum(lengths), device=device)
        add_pieces_(flat.split(lengths), torch.ones((), device=device), stream, pieces)
        for part in flat.split(SERIAL):
            squares = part.cpu().double().square_()
            squares[0] += total
            total = squares.cumsum(0)[-1]  # of one dimension it adds one by one; a sum would add in pairs
    return float(total)


def in_order(sizes: Sequence[int]) -> Iterator[list[Piece]]:
    """All elements, ascending, in runs of at most ``CHUNK``; neighbouring small tensors share one."""
    together: list[Piece] = []
    for tensor, size in enumerate(sizes):
        if together and (size > SMALL or sum(stop for *_, stop in together) + size > CHUNK):
            yield together
            together = []
        if size > SMALL:
            yield from ([(tensor, start, min(start + CHUNK, size))] for start in range(0, size, CHUNK))
        else:
            together.append((tensor, 0, size))
    if together:
        yield together
