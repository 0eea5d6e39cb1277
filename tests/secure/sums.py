"""A secure sum without a run: its clients in numpy, and a server that can lose or spoil any of their messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from hosfl_client.bfloat16 import Array
from hosfl_client.secure.participants import Participants
from hosfl_client.secure.summation import MaskedSum, threshold_of
from hosfl_client.wire import ProjectedGradients, SecurePeers, SecureShares, UnmaskRequest

#: What takes the place of an engine's tensors.
ITSELF: Callable[[Array], Array] = lambda array: array  # noqa: E731


def answers_of(clients: Iterable[int], size: int, seed: int = 0) -> dict[int, ProjectedGradients]:
    """Of unequal clients."""
    draw = np.random.default_rng(seed)
    return {k: ProjectedGradients(0, k, {}, draw.normal(size=size).astype(np.float32), int(draw.integers(1, 50)))
            for k in clients}  # fmt: skip


@dataclass
class Sum:
    """The server's part, step by step; whoever is in ``lost`` of a step sends nothing from there on."""

    answers: dict[int, ProjectedGradients]
    fraction: float = 2 / 3
    clients: Participants = field(default_factory=lambda: Participants(ITSELF))

    def keys(self) -> None:
        self.public = {k: np.asarray(self.clients.keep(answer).keys) for k, answer in self.answers.items()}
        self.peers = [*self.public]
        self.threshold = threshold_of(self.fraction, len(self.peers))

    def request(self, k: int) -> SecurePeers:
        return SecurePeers(0, k, self.peers, np.stack([*self.public.values()]), self.threshold)

    def share(self, lost: Iterable[int] = ()) -> None:
        self.shares = {k: self.clients.respond(self.request(k)) for k in self.peers if k not in lost}

    def handed(self, k: int) -> SecureShares:
        others = [j for j in self.shares if j != k]
        rows = [np.asarray(self.shares[j].shares)[self.shares[j].peers.index(k)] for j in others]
        return SecureShares(0, k, others, np.stack(rows))

    def mask(self, lost: Iterable[int] = ()) -> None:
        size = len(next(iter(self.answers.values())).coefficients)
        public = {k: row.tobytes() for k, row in self.public.items()}
        self.total = MaskedSum(public, [*self.shares], self.threshold, size)
        self.masked = {k: np.asarray(self.clients.respond(self.handed(k)).masked)
                       for k in self.shares if k not in lost}  # fmt: skip
        for k, masked in self.masked.items():
            self.total.add(k, masked)

    def reveal(self, lost: Iterable[int] = ()) -> dict[int, Array]:
        told = {k: UnmaskRequest(0, k, self.total.survivors) for k in self.total.survivors if k not in lost}
        return {k: np.asarray(self.clients.respond(request).shares) for k, request in told.items()}

    def run(self, unshared: Iterable[int] = (), unmasked: Iterable[int] = (), unrevealed: Iterable[int] = ()) -> Array:
        """All steps; (P,) uint64."""
        self.keys()
        self.share(unshared)
        self.mask(unmasked)
        return self.total.open(self.reveal(unrevealed))
