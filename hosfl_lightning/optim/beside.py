"""A gradient that is known whole beside one that is not: two bases, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.optim.basis import Basis, Dense, Piece


class Beside(Basis):
    r"""``ĝ = (reconstruct(c_1..c_P), c_{P+1}..)``: the first tensors in a basis of theirs, the last ones as they are.

    For a head that is trained at the client by its exact gradient, beside a half of which ``P`` scalars travel.

    Args:
        first: Of the first tensors.
        sizes: Elements of each tensor, in manifest order.
        last: How many of them, >= 1, are behind the first ones.
    """

    def __init__(self, first: Basis, sizes: Sequence[int], last: int) -> None:
        self.first, self.last, self.tensors = first, Dense(sizes[len(sizes) - last :]), len(sizes) - last

    @property
    @override
    def size(self) -> int:
        return self.first.size + self.last.size

    @override
    def of_clients(self, clients: Sequence[int]) -> Beside:
        """The first one's are; a gradient as it is is nobody's."""
        own = copy(self)
        own.first = self.first.of_clients(clients)
        return own

    @override
    def describe(self) -> dict[str, Any]:
        return {**self.first.describe(), "beside": len(self.last.starts) - 1}

    @override
    def expand_(self, out: Sequence[Tensor], coefficients: Tensor, pieces: Sequence[Piece]) -> None:
        parts = coefficients.split([self.first.size, self.last.size])
        for basis, part, begin in zip((self.first, self.last), parts, (0, self.tensors)):
            own = [(o, (t - begin, *cut)) for o, (t, *cut) in zip(out, pieces) if (t >= self.tensors) == (begin > 0)]
            if own:
                basis.expand_([target for target, _ in own], part, [(t, a, b) for _, (t, a, b) in own])

    @override
    def project(self, gradient: Sequence[Tensor]) -> Tensor:
        known = self.first.project(gradient[: self.tensors]), self.last.project(gradient[self.tensors :])
        return torch.cat(known)
