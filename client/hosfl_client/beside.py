"""Two bases side by side: of what is probed, and of what is known as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np

from hosfl_client.basis import Basis, Chunk, Dense
from hosfl_client.bfloat16 import Floats


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

    def of_clients(self, clients: Sequence[int]) -> Beside:
        """The first one's are; a gradient as it is is nobody's."""
        own = copy(self)
        own.first = self.first.of_clients(clients)
        return own

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
