"""One client in one secure sum (Bonawitz et al. 2017, arXiv 1611.04482, for a server that follows the protocol)."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hosfl_client.bfloat16 import Array
from hosfl_client.refusals import EndpointError
from hosfl_client.secure.fixed_point import MOST_CLIENTS
from hosfl_client.secure.masks import (
    PUBLIC,
    SEALED,
    SEED,
    agreed,
    pair_mask,
    private_key,
    public_of,
    seal,
    self_mask,
    split,
    unseal,
)

#: Answers of a sum, at least: of two, each of the clients knows the other's.
LEAST = 3


class Participant:
    r"""The client's four steps, each taken once, in this order; its secrets are made anew in every attempt.

    ::

        keys      two public keys, of pairs that seal and that mask
        share     each secret (b_k, and the seed of the mask's key pair) in K shares, two for each other client, sealed
        mask      y_k = x_k + PRG(b_k) + Σ_{j>k} PRG(s_kj) − Σ_{j<k} PRG(s_kj)  mod 2^64, over those who have shared
        reveal    of each of those one share: of b_j where y_j has come, of the key's seed where it has not

    The server can open y_j with either of a client's secrets and no other, so a client gives shares once, and of each
    other client one kind alone.

    Args:
        client: Its number k.
        encoded: x_k, (P,) uint64.
    """

    def __init__(self, client: int, encoded: Array) -> None:
        self.client, self.encoded = client, encoded
        self._self_seed, self._key_seed = secrets.token_bytes(SEED), secrets.token_bytes(SEED)
        self._sealing, self._masking = X25519PrivateKey.generate(), private_key(self._key_seed)
        self._next = "share"

    @property
    def keys(self) -> Array:
        """Its public keys, uint8 (64,)."""
        return np.frombuffer(public_of(self._sealing) + public_of(self._masking), np.uint8)

    def share(self, peers: Sequence[int], keys: Array, threshold: int) -> tuple[list[int], Array]:
        """Sealed shares for the others.

        Args:
            peers: Who takes part, ascending.
            keys: Their public keys, uint8 (K, 64).
            threshold: Shares that open a secret, more than half of K.

        Returns:
            The others, and a row for each, uint8 (K - 1, 48).

        Raises:
            EndpointError: Who takes part, or the threshold, would not keep this client's answer.
        """
        self._take("share")
        count = len(peers)
        if [*peers] != sorted(set(peers)) or not LEAST <= count <= MOST_CLIENTS:
            raise self._refusal(f"{count} clients take part, in ascending order it must be {LEAST} to {MOST_CLIENTS}")
        if not count < 2 * threshold <= 2 * count:
            raise self._refusal(f"{threshold} shares of {count} are to open a secret, and it must be more than half")
        if keys.shape != (count, 2 * PUBLIC) or self.client not in peers:
            raise self._refusal("the list of public keys has no place for its own")
        if keys[peers.index(self.client)].tobytes() != self.keys.tobytes():
            raise self._refusal("the list of public keys has another one in its name")
        self._peers, self._threshold = [*peers], threshold
        self._keys = {peer: row.tobytes() for peer, row in zip(peers, keys)}
        pairs = [a + b for a, b in zip(*(split(s, threshold, count) for s in (self._self_seed, self._key_seed)))]
        others = [peer for peer in peers if peer != self.client]
        self._shares = {self.client: pairs[peers.index(self.client)]}
        sealed = [seal(self._box(self.client, j), pair) for j, pair in zip(peers, pairs) if j != self.client]
        return others, np.frombuffer(b"".join(sealed), np.uint8).reshape(-1, SEALED)

    def mask(self, peers: Sequence[int], sealed: Array) -> Array:
        """y_k.

        Args:
            peers: The others who have shared, ascending.
            sealed: What they have sealed for this client, uint8 (n, 48).

        Returns:
            uint8 (8P,).

        Raises:
            EndpointError: They are too few, or not of those who take part.
        """
        self._take("mask")
        if [*peers] != sorted({*peers} & {*self._peers} - {self.client}) or sealed.shape != (len(peers), SEALED):
            raise self._refusal("shares were handed on of clients that do not take part")
        self._check_number(1 + len(peers), "have shared their secrets")
        for peer, row in zip(peers, sealed):
            self._shares[peer] = unseal(self._box(peer, self.client), row.tobytes(), peer)
        total = self.encoded + self_mask(self._self_seed, len(self.encoded))
        for peer in peers:
            total += pair_mask(self.client, self._masking, peer, self._keys[peer][PUBLIC:], len(total))
        del self.encoded, self._self_seed, self._key_seed
        return total.astype("<u8", copy=False).view(np.uint8)

    def reveal(self, survivors: Sequence[int]) -> tuple[list[int], Array]:
        """One share of each who has shared: what opens the sum of the survivors.

        Args:
            survivors: Whose masked answers the server has, ascending.

        Returns:
            Who has shared, itself among them, and a row of each, uint8 (n, 16).

        Raises:
            EndpointError: The survivors are too few, or not of those who have shared; or shares were revealed before.
        """
        self._take("reveal")
        if [*survivors] != sorted({*survivors} & self._shares.keys()) or self.client not in survivors:
            raise self._refusal("it is told of answers of clients that have not shared, or not of its own")
        self._check_number(len(survivors), "have answered")
        shared, shares = sorted(self._shares), self._shares
        del self._shares
        rows = [shares[j][:SEED] if j in survivors else shares[j][SEED:] for j in shared]
        return shared, np.frombuffer(b"".join(rows), np.uint8).reshape(-1, SEED)

    def _take(self, step: str) -> None:
        if step != self._next:
            raise self._refusal(f"it is asked to {step}, and {f'to {self._next} is next' if self._next else 'has'}")
        order = ("share", "mask", "reveal", "")
        self._next = order[order.index(step) + 1]

    def _box(self, sender: int, receiver: int) -> bytes:
        other = receiver if sender == self.client else sender
        return agreed(self._sealing, self._keys[other][:PUBLIC], f"shares of {sender} for {receiver}")

    def _check_number(self, count: int, what: str) -> None:
        least = max(LEAST, self._threshold)
        if count < least:
            raise self._refusal(f"{count} clients {what}, and it must be {least}")

    def _refusal(self, why: str) -> EndpointError:
        self._next = ""
        return EndpointError(f"client {self.client} takes no part in this secure sum: {why}")
