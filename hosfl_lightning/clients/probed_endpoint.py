"""The client whose probes the server evaluates: every probe's z goes up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.clients.cohort import Batch, Cohort
from hosfl_lightning.clients.endpoint import Endpoint, EndpointError
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.optim import SharedDirections
from hosfl_lightning.wire import Message, ProbedData, ProbeRequest, StepRequest

SIDES = (1, -1)
"""Of a probe: ``θ + μu``, ``θ − μu``."""


class ProbedEndpoint(Endpoint):
    r"""``StepRequest → SmashedData``, ``ProbeRequest → ProbedData``, ``Update →``.

    | setting | meaning |
    |---|---|
    | ``probes, mu, estimator, distribution`` | of the directions |
    | ``probe_first`` | the first z is that of the first side of the first probe, not that at θ_c |
    """

    client: ForwardOnlyClient

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visits: dict[int, tuple[Cohort, Batch]] = {}

    @override
    def make_client(self, half: nn.Module) -> ForwardOnlyClient:
        return ForwardOnlyClient(half, self.zeroth_order(half))

    @override
    def respond(self, requests: Sequence[Any]) -> list[Message]:
        match requests[0]:
            case StepRequest():
                return self.forward(requests)
            case ProbeRequest():
                return self.probe(requests)
        return super().respond(requests)

    @override
    def forget(self) -> None:
        self.visits.clear()

    def forward(self, requests: Sequence[StepRequest]) -> list[Message]:
        """``z_k`` with labels and mask."""
        clients, round = [request.client for request in requests], requests[0].round
        cohort = self.data(clients, round)
        batch = self.fabric.to_device(cohort.batch)
        self.visits |= dict.fromkeys(clients, (cohort, batch))
        if self.terms.settings["probe_first"]:
            z = self._at(batch, round, 0, 0)
        else:
            with self.fabric.autocast():
                z = self.client.forward(batch, cohort.rows).z
        return [*self.smashed(cohort, z, requests[0])]

    def probe(self, requests: Sequence[ProbeRequest]) -> list[Message]:
        """``f_c(x_k; θ_c ± μ u_p)`` of the clients that are asked."""
        first = requests[0]
        if first.client not in self.visits:
            raise EndpointError(f"client {first.client} is asked for a probe, and has begun no round")
        cohort, batch = self.visits[first.client]
        z, parts, codec = self._at(batch, first.round, first.probe, first.side), cohort.parts(), self.terms.codecs
        answers: list[Message] = []
        for r in requests:
            rows, width, _ = parts[r.client]
            answers.append(ProbedData.pack(
                r.round, r.client, r.probe, r.side, z[rows, :width], cohort.mask(rows, width), codec["smashed_data"],
                self.terms.seed, attempt=r.attempt,
            ))  # fmt: skip
        return answers

    def _at(self, batch: Batch, round: int, probe: int, side: int) -> Tensor:
        basis = self.basis(round)
        assert isinstance(basis, SharedDirections)
        with self.fabric.autocast():
            return self.client.probe(batch, basis, probe, SIDES[side] * self.client.optimizer.mu)
