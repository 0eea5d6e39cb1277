"""The client of MU-SplitFed: it is probed by the server, told what came of it, and sends its weights back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.clients.cohort import Batch, Cohort
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.clients.local_endpoint import LocalEndpoint, Steps
from hosfl_lightning.clients.probed_endpoint import SIDES
from hosfl_lightning.wire import Message, ProbedData, ProbeRequest, ProjectedGradients


class UnbalancedEndpoint(LocalEndpoint):
    r"""``Weights → SmashedData``, ``ProbeRequest → ProbedData`` of both sides of every probe, ``ProjectedGradients →
    Weights``: one step along directions of its own, with what the server has measured.

    | setting | meaning |
    |---|---|
    | ``probes, mu, estimator, distribution`` | of the directions |
    | ``local_steps, checkpointing`` | 1 and false |
    """

    client: ForwardOnlyClient

    @override
    def make_client(self, half: nn.Module) -> ForwardOnlyClient:
        return ForwardOnlyClient(half, self.zeroth_order(half))

    @override
    def local_step(self, request: Any, step: int, cohort: Cohort, batch: Batch) -> Steps:
        directions = self.client.optimizer.basis(request.round).of_client(request.client)
        with self.fabric.autocast():
            z = self.client.forward(batch, cohort.rows).z
        reply: Message = yield self.smashed(cohort, z, request, step)[0]
        del z  # the server has it
        while isinstance(reply, ProbeRequest):
            with self.fabric.autocast():
                scale = SIDES[reply.side] * self.client.optimizer.mu
                probed = self.client.probe(batch, directions, reply.probe, scale)
            reply = yield self.packed(reply, cohort, probed)
        assert isinstance(reply, ProjectedGradients)
        self.client.optimizer.record(reply.coefficients, directions)
        self.client.optimizer.step()
        return None

    def packed(self, request: ProbeRequest, cohort: Cohort, z: Tensor) -> ProbedData:
        """z of one side of a probe, as it travels."""
        [(rows, width, _)] = cohort.parts().values()
        return ProbedData.pack(
            request.round, request.client, request.probe, request.side, z[rows, :width], cohort.mask(rows, width),
            self.terms.codecs["smashed_data"], self.terms.seed, attempt=request.attempt,
        )  # fmt: skip
