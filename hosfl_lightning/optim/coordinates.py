"""A seeded subset of a known gradient's coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.optim.basis import Basis, Piece
from hosfl_lightning.rng import Domain
from hosfl_lightning.rng.sampling import permutation


class Coordinates(Basis):
    r"""``ĝ = (d/m) Σ_{i∈S} c_i e_i``, ``c_i = g_i``: ``m`` of ``d`` coordinates, the same for every client of a round.

    ``S`` is a uniform sample without replacement that follows from ``(seed, round)``, so no index travels. The mean of
    ``ĝ`` over rounds is ``g``.

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
        self.count, self.scale = count, total / count
        self._drawn = total, seed, round

    @cached_property
    def chosen(self) -> Tensor:
        """``S``, ascending; drawn when it is needed, which it is not by whoever only passes the coefficients on."""
        total, seed, round = self._drawn
        return permutation(total, seed, Domain.COORDINATES, round=round)[: self.count].sort().values

    @property
    @override
    def size(self) -> int:
        return self.count

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "coordinates", "count": self.size}

    @override
    def expand_(self, out: Sequence[Tensor], coefficients: Tensor, pieces: Sequence[Piece]) -> None:
        for target, (tensor, start, stop) in zip(out, pieces):
            begin = self.starts[tensor] + start
            bounds = torch.tensor([begin, begin + stop - start])
            first, last = torch.searchsorted(self.chosen, bounds).tolist()
            places = (self.chosen[first:last] - begin).to(target.device)
            target.index_add_(0, places, coefficients[first:last] * self.scale)

    @override
    def project(self, gradient: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([g.reshape(-1).float() for g in gradient])
        return flat[self.chosen.to(flat.device)]
