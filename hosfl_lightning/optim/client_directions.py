"""Directions that are each client's own: more of the space is seen by as many forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hosfl_client.client_directions import check_clients
from hosfl_lightning.optim.basis import SharedDirections


class ClientDirections(SharedDirections):
    r"""``ĝ = Σ_k (1/P) Σ_p c_kp u_kp``, ``c_kp = w_k v_kp``: each client of a round has ``P`` directions of its own.

    A round is ``P`` scalars up for a client, as along shared directions, and ``K · P`` down. Of ``K`` clients with one
    gradient the estimate is that of ``K · P`` probes; along shared directions it stays that of ``P``.

    Args:
        seed: The run's 64-bit seed.
        round: Counted from 0.
        probes: ``P``, 1..4096.
        clients: Whose directions, ascending; coefficients come in their order, each client's ``P`` together.
        distribution: ``rademacher`` or ``gauss16``.

    Raises:
        ValueError: A setting is out of range.

    Reference: the shared streams with a client's number in the counter; as FedKSeed's clients draw, arXiv 2312.06353.
    """

    def __init__(
        self, seed: int, round: int, probes: int, clients: Sequence[int], distribution: str = "rademacher"
    ) -> None:
        super().__init__(seed, round, probes, distribution)
        check_clients(probes, clients)
        self._drawn, self.clients = (seed, round, probes), list(clients)
        self.streams = [stream for client in clients for stream in self.of_client(client).streams]

    @property
    @override
    def probes(self) -> int:
        return self._drawn[2]

    @override
    def of_clients(self, clients: Sequence[int]) -> ClientDirections:
        """Those of other clients."""
        return ClientDirections(*self._drawn, clients, self.distribution)

    @override
    def describe(self) -> dict[str, Any]:
        return {"kind": "client_directions", "probes": self.probes, "clients": self.clients,
                "distribution": self.distribution}  # fmt: skip
