"""SplitFed, first variant: a server half for every client, averaged as the clients' halves are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from hosfl_lightning.algorithms.local_training import LocalSplitTraining, Losses
from hosfl_lightning.clients.vectors import flat, parts
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import Weights


class SplitFedV1(LocalSplitTraining):
    r"""Each client has a server half of its own in a round; both halves are averaged at its end.

    ::

        for client k, step e:   θ_sk ← rule(θ_sk, ∂ℓ_k/∂θ_sk),  λ = ∂ℓ_k/∂z;   θ_k ← rule(θ_k, ∇⟨λ, f_c(x; θ_k)⟩)
        all                     θ_c ← Σ_k w_k θ_k,   θ_s ← Σ_k w_k θ_sk

    Every round begins with the shared θ_s; the moments of a client's server half are kept for its next round. With
    plain SGD and one local step both halves move as in `SplitFedSGD`. The server holds K copies of what it trains,
    where the memory report has one. ``aggregation`` serves both halves.

    As HERON-SFL reports it for ResNet-18 on CIFAR-10, 5 clients: 710 MB peak and 59.5 GFLOP a step at the client, 1216
    GB of traffic.

    Reference: SplitFed, arXiv 2004.12088, SplitFedV1; HERON-SFL, arXiv 2601.09076.
    """

    @override
    def setup(self, server: Server) -> None:
        """Nobody has trained a server half yet."""
        super().setup(server)
        self.server_moments: dict[int, Any] = {}
        self._start: list[Tensor] = []
        self._copies: dict[int, Copy] = {}

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """Between rounds the server's optimizer holds no moments."""
        self._start, self._copies = server.state()[0], {}
        outcome = super().server_round(server, fleet, call)
        copies, start = self._copies.values(), flat(self._start)
        shared = self.average(start, [flat(copy.parameters) for copy in copies], [copy.num_terms for copy in copies])
        self._put(server, parts(shared, self._start), {})
        self.server_moments |= {client: copy.moments for client, copy in self._copies.items()}
        return outcome

    @override
    def visit(
        self, server: Server, fleet: Fleet, call: Call, client: int, shared: Tensor, losses: Losses
    ) -> list[Weights]:
        """With the server half and the moments of the client."""
        self._put(server, self._start, self.server_moments.get(client, {}))
        answer = super().visit(server, fleet, call, client, shared, losses)
        for message in answer:
            parameters, optimizer = server.state()
            self._copies[client] = Copy(parameters, optimizer["state"], message.num_terms)
        return answer

    def _put(self, server: Server, parameters: list[Tensor], moments: Any) -> None:
        # Settings as they are now: a schedule may have changed the learning rate since the moments were put by.
        server.put(parameters, {**server.optimizer.state_dict(), "state": moments})

    @override
    def state_dict(self) -> dict[str, Any]:
        """The moments of each client's server half as well."""
        return {**super().state_dict(), "server_moments": self.server_moments}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.server_moments = dict(state["server_moments"])


@dataclass(frozen=True)
class Copy:
    """A client's server half after its steps, the optimizer's moments, and how many loss terms are behind them."""

    parameters: list[Tensor]
    moments: Any
    num_terms: int
