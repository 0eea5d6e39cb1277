"""The server's arithmetic of a secure sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hosfl_client.bfloat16 import Array
from hosfl_client.secure.masks import PUBLIC, combine, pair_mask, private_key, public_of, self_mask
from hosfl_client.secure.participant import LEAST


class UnmaskError(ValueError):
    """The sum cannot be opened."""


def threshold_of(fraction: float, clients: int) -> int:
    """``t = ⌈fraction K⌉``, and more than ``K/2``."""
    return max(clients // 2 + 1, math.ceil(fraction * clients - 1e-9))


class MaskedSum:
    """``Σ_k y_k`` and then ``Σ_k x_k``; of a masked answer nothing is kept but what it adds to the sum.

    Args:
        keys: Public keys of all who take part, by client, ascending: 64 bytes each.
        sharers: Those of them who have shared their secrets, ascending.
        threshold: Shares that open a secret.
        size: P.

    Attributes:
        survivors: Whose masked answers are in the sum.
    """

    def __init__(self, keys: Mapping[int, bytes], sharers: Sequence[int], threshold: int, size: int) -> None:
        self.keys, self.sharers, self.threshold = keys, [*sharers], threshold
        self.survivors: list[int] = []
        self._places = {client: place for place, client in enumerate(keys)}
        self._total = np.zeros(size, np.uint64)

    def add(self, client: int, masked: Array) -> None:
        """``Σ += y_k``; ``masked`` is uint8 (8P,).

        Raises:
            UnmaskError: It is of another length.
        """
        if masked.shape != (8 * len(self._total),):
            raise UnmaskError(f"its masked answer has {len(masked)} bytes, the round has {8 * len(self._total)}")
        self._total += masked.view("<u8")
        self.survivors.append(client)

    def open(self, revealed: Mapping[int, Array]) -> Array:
        """``Σ_k x_k`` over the survivors.

        Args:
            revealed: By client, its share of each of the sharers, uint8 (n, 16).

        Returns:
            (P,) uint64.

        Raises:
            UnmaskError: Fewer shares, or answers, than it takes; or a secret is not the one that was shared.
        """
        if len(self.survivors) < max(LEAST, self.threshold) or len(revealed) < self.threshold:
            raise UnmaskError(
                f"{len(self.survivors)} answers and {len(revealed)} shares of each secret: it takes {self.threshold} "
                f"of both, and {LEAST} answers"
            )
        givers, total = [*revealed][: self.threshold], self._total.copy()
        for row, client in enumerate(self.sharers):
            secret = combine([(self._places[giver], revealed[giver][row].tobytes()) for giver in givers])
            total -= self._mask(client, secret)
        return total

    def _mask(self, client: int, secret: bytes) -> Array:
        """What is in the sum because of one client: its self-mask, or of one who dropped out the pairs with it."""
        size = len(self._total)
        if client in self.survivors:
            return self_mask(secret, size)
        private = private_key(secret)
        if public_of(private) != self.keys[client][PUBLIC:]:
            raise UnmaskError(f"the shares of client {client}'s key do not give its key")
        # Survivor k added the pair's mask with its own sign, which is the other one than that of this client.
        masks = (pair_mask(client, private, other, self.keys[other][PUBLIC:], size) for other in self.survivors)
        return np.negative(sum(masks, np.zeros(size, np.uint64)))
