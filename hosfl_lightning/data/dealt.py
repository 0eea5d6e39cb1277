"""Who holds which of the examples that all clients share, as indices: an example is made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.tokenization import Example


class TokenRows(Sequence[Example]):
    """Examples that are rows of two tensors; reading one copies nothing.

    Example::

        data.deal(TokenRows(tokens), IID(), num_clients=100_000)

    Args:
        input_ids: ``(n, T)``, no padding.
        labels: ``(n, T)`` or ``(n,)``; None: the tokens themselves, as of a causal LM.
    """

    def __init__(self, input_ids: Tensor, labels: Tensor | None = None) -> None:
        self.input_ids, self.labels = input_ids, input_ids if labels is None else labels

    @override
    def __len__(self) -> int:
        return len(self.input_ids)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> TokenRows: ...
    @override
    def __getitem__(self, at: Any) -> Any:
        found: Any = self.input_ids[at], self.labels[at]
        return TokenRows(*found) if isinstance(at, slice) else Example(*found)


class Held(Sequence[Any]):
    """One client's examples.

    Args:
        examples: All that there are.
        places: Its own among them, ``(n_k,)`` int64.
    """

    def __init__(self, examples: Sequence[Any], places: NDArray[np.int64]) -> None:
        self.examples, self.places = examples, places

    @override
    def __len__(self) -> int:
        return len(self.places)

    @override
    def __getitem__(self, at: Any) -> Any:
        found = self.places[at].tolist()
        return [self.examples[i] for i in found] if isinstance(at, slice) else self.examples[found]


class Dealt(Sequence[Held]):
    """Each client's examples; 16 bytes a client and 8 an example.

    Args:
        examples: All that there are.
        places: Each client's among them, one client after the other, ``(n,)`` int64.
        ends: Where each client's end, ``(N,)`` int64.
    """

    def __init__(self, examples: Sequence[Any], places: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.examples, self.places, self.ends = examples, places, ends

    @override
    def __len__(self) -> int:
        return len(self.ends)

    @override
    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[client] for client in range(*at.indices(len(self)))]
        client = range(len(self))[at]
        begin = int(self.ends[client - 1]) if client else 0
        return Held(self.examples, self.places[begin : int(self.ends[client])])
