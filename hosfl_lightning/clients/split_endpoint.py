"""The client of a split round: z up, λ down, one gradient up, one update down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hosfl_client.secure.extra import participants
from hosfl_lightning.aggregation import apply_update
from hosfl_lightning.clients.base import Anchor, SplitClient
from hosfl_lightning.clients.cohort import Batch, Cohort
from hosfl_lightning.clients.endpoint import Endpoint, EndpointError
from hosfl_lightning.clients.first_order import FirstOrderClient
from hosfl_lightning.clients.forward_only import ForwardOnlyClient
from hosfl_lightning.clients.frozen import FrozenClient
from hosfl_lightning.clients.head import HeadClient, of_head
from hosfl_lightning.clients.local_gradient import LocalGradientClient
from hosfl_lightning.optim import Basis, Beside, ClientDirections, ZerothOrder
from hosfl_lightning.wire import (
    CodedGradient,
    Message,
    MiddleOutput,
    Multiplier,
    OutputMultiplier,
    ProjectedGradients,
    SecurePeers,
    SecureShares,
    StepRequest,
    UnmaskRequest,
    Update,
)


@dataclass(frozen=True)
class Visit:
    """Clients of a round, and what they keep while they wait for λ; of a head that is trained, each one's gradient."""

    cohort: Cohort
    batch: Batch
    anchor: Anchor
    heads: dict[int, Tensor] = field(default_factory=dict)


class SplitEndpoint(Endpoint):
    r"""``StepRequest → SmashedData``, ``Multiplier → ProjectedGradients``, ``Update →``.

    Where the labels stay with it: ``StepRequest → UnlabelledData``, ``MiddleOutput → OutputMultiplier``, then the same;
    the exact gradient of a head that is trained follows on the half's coefficients.
    Of a secure sum ``Multiplier → SecureKeys``, and the answer is kept until it can be sent under masks.

    | setting | meaning |
    |---|---|
    | ``kind`` | ``forward_only``, ``local`` (a side adapter's exact gradient), ``first_order`` or ``frozen`` |
    | ``probes, mu, estimator, distribution`` | of a client that probes |
    | ``probe_batch`` | likewise, as in `ForwardOnlyClient`; 1 where it is not said |
    | ``taps`` | as in `LocalGradientClient` |
    | ``checkpointing`` | as in `FirstOrderClient` |
    | ``labels, report_loss`` | where they stay with it: ``client``, and whether the loss is told |
    """

    client: SplitClient
    _rule: ZerothOrder | None = None
    noises = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visits: dict[int, Visit] = {}
        if self.terms.secure_aggregation:
            self.hidden = participants(torch.from_numpy)

    @staticmethod
    @override
    def hold(model: Any, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """As of `Endpoint`; beside a frozen half whose labels stay here, the head alone is trained."""
        frozen = model.labels == "client" and settings.get("kind") == "frozen"
        return model.client_half, of_head(model) if frozen else model.client_parameters

    @override
    def make_client(self, half: nn.Module) -> SplitClient:
        client = self.engine(half, self.terms.settings["kind"] if self.below or self.head is None else "frozen")
        if self.head is not None and self.head.size:
            self._rule = self.mover(self.trained, nn.ModuleList([half, self.head.head]), client.optimizer)
        return client

    @cached_property
    def head(self) -> HeadClient | None:
        """Where labels and loss stay here."""
        return HeadClient(self.model.client_head) if self.model.labels == "client" else None

    @property
    @override
    def below(self) -> dict[str, nn.Parameter]:
        """Without the head, whose gradient is known."""
        head = of_head(self.model)
        return {name: p for name, p in self.trained.items() if name not in head}

    @property
    @override
    def shared_rule(self) -> ZerothOrder:
        return self._rule or self.client.optimizer

    def mover(self, trained: Mapping[str, nn.Parameter], module: nn.Module, like: ZerothOrder) -> ZerothOrder:
        """The rule that moves what an engine measures and what else there is, with the settings of its own."""
        group = like.param_groups[0]
        rule = ZerothOrder(
            [{"params": [*trained.items()]}], self.rule, module=module, probes=group["probes"], mu=group["mu"],
            estimator=like.estimator, distribution=group["distribution"], seed=self.terms.seed,
        )  # fmt: skip
        rule.probed = like.probed  # whether μ is in the coefficients
        return rule

    def engine(self, half: nn.Module, kind: str) -> SplitClient:
        """What runs the half of a client of that kind."""
        settings = self.terms.settings
        together = settings.get("probe_batch", 1)
        if kind == "forward_only":
            return ForwardOnlyClient(half, self.zeroth_order(half), together)
        if kind == "local":  # the estimator is of what else is trained
            return LocalGradientClient(half, self.zeroth_order(half, "forward"), settings["taps"], together)
        plain = ZerothOrder([{"params": [*self.below.items()]}], self.rule)  # of which there may be none
        if kind == "frozen":
            plain.probed = set()
            return FrozenClient(half, plain)
        return FirstOrderClient(half, plain, settings.get("checkpointing", False))

    def engine_of(self, client: int) -> SplitClient:
        """What runs the half of that client."""
        return self.client

    def answered_in(self, client: int, round: int) -> Basis | None:
        """In what that client answers λ; None: it does not."""
        return self.basis(round).of_clients([client]) if self.terms.basis else None

    @override
    def respond(self, requests: Sequence[Any]) -> list[Message]:
        match requests[0]:
            case StepRequest():
                return self.forward(requests)
            case MiddleOutput():
                return [self.output(request) for request in requests]
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
            anchor = self.engine_of(clients[0]).forward(batch, self.rows(cohort))
        if self.head is not None or self.answered_in(clients[0], requests[0].round) is not None:
            self.visits |= dict.fromkeys(clients, Visit(cohort, batch, anchor))
        return [*self.smashed(cohort, anchor.z, requests[0])]

    def output(self, request: MiddleOutput) -> OutputMultiplier:
        """Step 3 where the labels stay here: λ₂ of z₂."""
        visit, client = self.visits.get(request.client), request.client
        if visit is None or self.head is None:
            raise EndpointError(f"client {client} is sent a middle's output, and waits for none")
        rows, width, num_terms = visit.cohort.parts()[client]
        mask, labels = visit.cohort.mask(rows, width), visit.cohort.labels(rows, width)
        given = self.fabric.to_device((request.unpack(mask), mask.long(), labels))
        with self.fabric.autocast():
            loss, multiplier, visit.heads[client] = self.head.answer(*given)
        if self.answered_in(client, request.round) is None:
            self.visits.pop(client)
        place = request.kind, request.round, request.attempt, request.step, client
        multiplier = self.noised(multiplier, mask, OutputMultiplier.kind, place, scale=max(num_terms, 1))
        told = float(loss) if self.terms.settings["report_loss"] else None
        return OutputMultiplier.pack(
            request.round, client, multiplier, mask, loss=told, codec=self.terms.codecs["multiplier"],
            seed=self.terms.seed, step=request.step, attempt=request.attempt,
        )  # fmt: skip

    @override
    def apply(self, message: Update) -> None:
        if self._rule is None:
            super().apply(message)
        else:
            apply_update(message, self._rule)

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
            own = basis.first if isinstance(basis, Beside) else basis
            values = self._coefficients(engine, visit, multiplier, own).cpu()
        coefficients, parts = self.released(cohort, values, first), cohort.parts()
        return [
            ProjectedGradients(
                m.round, m.client, basis.of_clients([m.client]).describe(),
                self._with_head(coefficients[m.client], visit, m.client), parts[m.client][2], m.attempt,
            )
            for m in multipliers
        ]  # fmt: skip

    def _with_head(self, coefficients: Tensor, visit: Visit, client: int) -> Tensor:
        """The gradient of a head that is trained behind those of the half; zero of a client without a loss term."""
        if self.head is None or not self.head.size:
            return coefficients
        _, _, num_terms = visit.cohort.parts()[client]
        if num_terms and client not in visit.heads:
            raise EndpointError(f"client {client} is sent a multiplier before the middle's output")
        return torch.cat([coefficients, visit.heads.get(client, torch.zeros(self.head.size))])

    def _coefficients(self, engine: SplitClient, visit: Visit, multiplier: Tensor, basis: Basis) -> Tensor:
        """Of all in one batch; along directions of each client's own one by one, since no probe is of two of them."""
        cohort, rows = visit.cohort, self.rows(visit.cohort)
        if not isinstance(basis, ClientDirections):
            return engine.answer(visit.batch, visit.anchor, multiplier, rows, basis)
        visit.anchor.release(multiplier, rows)
        values, end = list[Tensor](), 0
        for client, examples in zip(cohort.clients, cohort.rows):
            own = [one for one in rows if examples.start <= one.start < examples.stop]
            begin, end = end, end + len(own)
            batch = {name: tensor[examples] for name, tensor in visit.batch.items()}
            anchor = visit.anchor.part(slice(begin, end), examples)
            inside = [slice(one.start - examples.start, one.stop - examples.start) for one in own]
            values.append(engine.answer(batch, anchor, multiplier[examples], inside, basis.of_clients([client])))
        return torch.cat(values)

    def rows(self, cohort: Cohort) -> list[slice]:
        """Of what an engine gives one vector each: a client's examples, or every example by itself."""
        if self.privacy is None or not self.privacy.by_example:
            return cohort.rows
        return [slice(i, i + 1) for i in range(cohort.num_examples)]

    def released(self, cohort: Cohort, values: Tensor, request: Multiplier) -> dict[int, Tensor]:
        r"""By client its coefficients: as measured, or clipped and noised.

        λ is of the mean over the client's n loss terms, so that a term more in one example would change the vectors of
        all others. An example's vector is made that of the mean over its own n_i: ``v_i · n / n_i``.

        Args:
            cohort: Whose they are.
            values: A row for each of `rows`.
            request: Of one of them.
        """
        privacy = self.privacy
        if privacy is None or privacy.level is None:
            return dict(zip(cohort.clients, values))
        found, wide = {}, values.double()
        for number, (client, (rows, _, terms)) in enumerate(cohort.parts().items()):
            own = wide[number : number + 1]
            if privacy.by_example:
                counts = [self.model.count(one) for one in cohort.batch["labels"][rows].split(1)]
                own = wide[rows] * torch.tensor([[terms / n if n else 0.0] for n in counts], dtype=torch.float64)
            found[client] = torch.from_numpy(privacy.answer(own.numpy(), request.round, request.attempt, client))
        return found

    def _coded(self, answer: ProjectedGradients) -> ProjectedGradients | CodedGradient:
        codec = self.terms.codecs["gradient"]
        if codec == "fp32":
            return answer
        return CodedGradient.pack(
            answer.round, answer.client, answer.basis, answer.coefficients, answer.num_terms, codec, self.terms.seed,
            answer.attempt,
        )  # fmt: skip
