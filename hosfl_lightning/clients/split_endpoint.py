"""The client of a split round: z up, λ down, one gradient up, one update down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from hosfl_client.secure.extra import participants
from hosfl_lightning.clients.base import Anchor, SplitClient
from hosfl_lightning.clients.cohort import Batch, Cohort
from hosfl_lightning.clients.endpoint import Endpoint, EndpointError
from hosfl_lightning.clients.first_order import FirstOrderClient
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.clients.frozen import FrozenClient
from hosfl_lightning.clients.local_gradient import LocalGradientClient
from hosfl_lightning.optim import Basis, ZerothOrder
from hosfl_lightning.wire import (
    CodedGradient,
    Message,
    Multiplier,
    ProjectedGradients,
    SecurePeers,
    SecureShares,
    StepRequest,
    UnmaskRequest,
)


@dataclass(frozen=True)
class Visit:
    """Clients of a round, and what they keep while they wait for λ."""

    cohort: Cohort
    batch: Batch
    anchor: Anchor


class SplitEndpoint(Endpoint):
    r"""``StepRequest → SmashedData``, ``Multiplier → ProjectedGradients``, ``Update →``.

    Of a secure sum ``Multiplier → SecureKeys``, and the answer is kept until it can be sent under masks.

    | setting | meaning |
    |---|---|
    | ``kind`` | ``forward_only``, ``local`` (a side adapter's exact gradient), ``first_order`` or ``frozen`` |
    | ``probes, mu, estimator, distribution`` | of a client that probes |
    | ``taps`` | as in `LocalGradientClient` |
    | ``checkpointing`` | as in `FirstOrderClient` |
    """

    client: SplitClient

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visits: dict[int, Visit] = {}
        if self.terms.secure_aggregation:
            self.hidden = participants(torch.from_numpy)

    @override
    def make_client(self, half: nn.Module) -> SplitClient:
        return self.engine(half, self.terms.settings["kind"])

    def engine(self, half: nn.Module, kind: str) -> SplitClient:
        """What runs the half of a client of that kind."""
        settings = self.terms.settings
        if kind == "forward_only":
            return ForwardOnlyClient(half, self.zeroth_order(half))
        if kind == "local":  # the estimator is of what else is trained
            return LocalGradientClient(half, self.zeroth_order(half, "forward"), settings["taps"])
        plain = ZerothOrder([{"params": [*self.trained.items()]}], self.rule)  # of which there may be none
        if kind == "frozen":
            return FrozenClient(half, plain)
        return FirstOrderClient(half, plain, settings.get("checkpointing", False))

    def engine_of(self, client: int) -> SplitClient:
        """What runs the half of that client."""
        return self.client

    def answered_in(self, client: int, round: int) -> Basis | None:
        """In what that client answers λ; None: it does not."""
        return self.basis(round) if self.terms.basis else None

    @override
    def respond(self, requests: Sequence[Any]) -> list[Message]:
        match requests[0]:
            case StepRequest():
                return self.forward(requests)
            case Multiplier():
                answers: list[Any] = self.answer(requests)
                return answers if self.hidden is None else [*map(self.hidden.keep, answers)]
            case SecurePeers() | SecureShares() | UnmaskRequest() if self.hidden is not None:
                return [*map(self.hidden.respond, requests)]
        return super().respond(requests)

    @override
    def forget(self) -> None:
        self.visits.clear()
        if self.hidden is not None:
            self.hidden.forget()

    def forward(self, requests: Sequence[StepRequest]) -> list[Message]:
        """Step 2: ``z_k = f_c(x_k; θ_c)``, kept until λ comes where one is to come."""
        clients = [request.client for request in requests]
        cohort = self.data(clients, requests[0].round)
        batch = self.fabric.to_device(cohort.batch)
        with self.fabric.autocast():
            anchor = self.engine_of(clients[0]).forward(batch, cohort.rows)
        if self.answered_in(clients[0], requests[0].round) is not None:
            self.visits |= dict.fromkeys(clients, Visit(cohort, batch, anchor))
        return [*self.smashed(cohort, anchor.z, requests[0])]

    def answer(self, multipliers: Sequence[Multiplier]) -> list[Message]:
        """Step 4: `measured`, as it travels."""
        return [*map(self._coded, self.measured(multipliers))]

    def measured(self, multipliers: Sequence[Multiplier]) -> list[ProjectedGradients]:
        """Each client's coefficients of ``∇⟨λ_k, f_c(x_k; θ_c)⟩``."""
        first = multipliers[0]
        visit, basis = self.visits.get(first.client), self.answered_in(first.client, first.round)
        if visit is None or basis is None:
            raise EndpointError(f"client {first.client} is sent a multiplier, and waits for none")
        engine = self.engine_of(first.client)
        for client in visit.cohort.clients:
            self.visits.pop(client, None)
        cohort, batch, anchor = visit.cohort, visit.batch, visit.anchor
        multiplier = cohort.multiplier(anchor.z, multipliers)
        with self.fabric.autocast():
            if self.checks and isinstance(engine, ForwardOnlyClient) and engine.optimizer.probed != set():
                engine.check_probe(batch, anchor.z, multiplier)
                self.checks = False
            values = engine.answer(batch, anchor, multiplier, cohort.rows, basis).cpu()
        coefficients, parts = dict(zip(cohort.clients, values)), cohort.parts()
        return [
            ProjectedGradients(
                m.round, m.client, basis.describe(), coefficients[m.client], parts[m.client][2], m.attempt
            )
            for m in multipliers
        ]

    def _coded(self, answer: ProjectedGradients) -> ProjectedGradients | CodedGradient:
        codec = self.terms.codecs["gradient"]
        if codec == "fp32":
            return answer
        return CodedGradient.pack(
            answer.round, answer.client, answer.basis, answer.coefficients, answer.num_terms, codec, self.terms.seed,
            answer.attempt,
        )  # fmt: skip
