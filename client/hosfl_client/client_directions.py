"""Directions that are each client's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hosfl_client.basis import SharedDirections

#: Of all clients of a round.
ALL_DIRECTIONS = 1 << 16


class ClientDirections(SharedDirections):
    r"""``ĝ = Σ_k (1/P) Σ_p c_kp u_kp``, ``c_kp = w_k v_kp``: each client of a round has ``P`` directions of its own.

    Args:
        seed: The run's 64-bit seed.
        round: Counted from 0.
        probes: ``P``, 1..4096.
        clients: Whose directions, ascending; coefficients come in their order, each client's ``P`` together.
        distribution: ``rademacher`` or ``gauss16``.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self, seed: int, round: int, probes: int, clients: Sequence[int], distribution: str = "rademacher"
    ) -> None:
        super().__init__(seed, round, probes, distribution)
        check_clients(probes, clients)
        self._drawn, self.clients = (seed, round, probes), list(clients)
        self.streams = [stream for client in clients for stream in self.of_client(client).streams]

    @property
    def probes(self) -> int:
        """``P``."""
        return self._drawn[2]

    def of_clients(self, clients: Sequence[int]) -> ClientDirections:
        """Those of other clients."""
        return ClientDirections(*self._drawn, clients, self.distribution)

    def describe(self) -> dict[str, Any]:
        """As `Basis.describe`."""
        return {"kind": "client_directions", "probes": self.probes, "clients": self.clients,
                "distribution": self.distribution}  # fmt: skip


def check_clients(probes: int, clients: Sequence[int]) -> None:
    """Raises ValueError unless the clients ascend, and have directions in a number that can be drawn."""
    if [*clients] != sorted(set(clients)):
        raise ValueError(f"clients must be different and ascend, got {[*clients]!r:.80}")
    if probes * len(clients) > ALL_DIRECTIONS:
        raise ValueError(
            f"{len(clients)} clients with {probes} directions of their own are more than {ALL_DIRECTIONS} in a round; "
            "take fewer of either, or directions: shared"
        )
