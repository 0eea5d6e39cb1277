"""The client that holds the whole model and sends scalars alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.aggregation import prescribe
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.clients.objective import ObjectiveClient, whole_model
from hosfl_lightning.optim import LocalWalk, SharedDirections
from hosfl_lightning.wire import Message, ProjectedGradients, StepRequest


class WalkEndpoint(Endpoint):
    r"""``StepRequest → ProjectedGradients`` of ``E`` local steps by forwards alone, with its mean loss; ``Update →``.

    | setting | meaning |
    |---|---|
    | ``probes, mu, estimator, distribution`` | of a local step |
    | ``local_steps`` | ``E`` |
    """

    client: ObjectiveClient
    needs = "whole"
    hold = staticmethod(whole_model)

    @override
    def make_client(self, half: nn.Module) -> ObjectiveClient:
        return ObjectiveClient(half, self.zeroth_order(half), self.model.loss, backprop=False)

    @override
    def respond(self, requests: Sequence[Any]) -> list[Message]:
        if isinstance(requests[0], StepRequest):
            return [self.walk(request) for request in requests]
        return super().respond(requests)

    def walk(self, request: StepRequest) -> ProjectedGradients:
        """``c_sp (E·P,)``; θ is where it was afterwards."""
        steps, total, terms, examples = self.terms.settings["local_steps"], 0.0, 0, 0
        basis = self.basis(request.round)
        assert isinstance(basis, SharedDirections)
        prescribe(self.client.optimizer, request.rule, f"the request of round {request.round}")
        with LocalWalk(self.client.optimizer, basis, steps) as walk:
            for step in range(steps):
                cohort = self.data([request.client], request.round * steps + step)
                examples += cohort.num_examples
                [n] = cohort.num_terms
                if not n:
                    continue
                with self.fabric.autocast():
                    values, loss = self.measure(self.fabric.to_device(cohort.batch), walk.directions(step))
                walk.move(step, values)
                total, terms = total + n * float(loss), terms + n
        return ProjectedGradients(
            request.round, request.client, basis.describe(), walk.coefficients, terms, request.attempt,
            loss=total / max(terms, 1), num_examples=examples,
        )  # fmt: skip

    def measure(self, batch: Batch, basis: SharedDirections) -> tuple[Tensor, Tensor]:
        """``v_sp (P,)`` and the loss: at θ, or the mean over both sides."""
        seen: list[Tensor] = []

        def objective() -> Tensor:
            seen.append(self.client.objective(batch))
            return seen[-1]

        values = self.client.optimizer.project(objective, basis=basis)
        return values, seen[0] if self.client.optimizer.estimator.begins_at_base else torch.stack(seen).mean()
