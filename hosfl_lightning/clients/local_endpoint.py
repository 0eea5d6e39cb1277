"""Clients that take the server's weights, train on their own, and send their weights back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.aggregation import prescribe
from hosfl_lightning.clients import vectors
from hosfl_lightning.clients.cohort import Batch, Cohort
from hosfl_lightning.clients.endpoint import Endpoint, EndpointError
from hosfl_lightning.clients.first_order import FirstOrderClient
from hosfl_lightning.clients.objective import ObjectiveClient, whole_model
from hosfl_lightning.optim import Dense, Moments, ZerothOrder
from hosfl_lightning.wire import Message, Multiplier, RoundEnd, Weights

Steps = Generator[Message, Any, Tensor | None]
"""What one client sends on its way and is sent in reply; in the end its loss, if it knows one."""


class LocalEndpoint(Endpoint):
    r"""``Weights →`` ``E`` local steps ``→ Weights``, with what a subclass sends on the way; ``RoundEnd →``.

    The moments of a client stay with it. What it did in a round counts once the server says so; then its next weights
    come from the server again.

    | setting | meaning |
    |---|---|
    | ``local_steps`` | ``E`` |
    | ``checkpointing`` | as in `FirstOrderClient` |
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moments = Moments(self.client.optimizer)
        self._walking: tuple[int, Generator[Message, Any, None]] | None = None

    @property
    def local_steps(self) -> int:
        """``E``."""
        return self.terms.settings["local_steps"]

    @abstractmethod
    def local_step(self, request: Any, step: int, cohort: Cohort, batch: Batch) -> Steps:
        """One step on one minibatch, with a loss term.

        Args:
            request: What began the round.
            step: The local step, 0 .. E − 1.
            cohort: The minibatch.
            batch: It, on the client's device.

        Returns:
            The training loss before the step, 0-d, where the client knows one.
        """

    @override
    def respond(self, requests: Sequence[Any]) -> list[Message]:
        [request] = requests
        if self.begins(request):
            self.forget()
            self._walking = request.client, self.walk(request)
            return [next(self._walking[1])]
        if self._walking is None or self._walking[0] != request.client:
            raise EndpointError(f"client {request.client} is sent a {request.kind}, and has begun no round")
        return [self._walking[1].send(request)]

    def begins(self, request: Message) -> bool:
        """Whether a request begins a client's round."""
        return isinstance(request, Weights)

    @override
    def forget(self) -> None:
        if self._walking is not None:
            self._walking[1].close()
            self._walking = None

    @override
    def end(self, message: RoundEnd) -> None:
        self.forget()
        self.moments.commit(message.counted)

    def walk(self, request: Weights) -> Generator[Message, Any, None]:
        """A client's round: what it sends, from the first message to its weights."""
        client, losses = request.client, list[tuple[Tensor, int]]()
        assert client is not None
        vectors.load(vectors.content(request, self.trained), self.trained)
        self.prescribed(request)
        with self.moments.of(client):
            terms, examples = yield from self.steps(request, client, losses)
        yield vectors.message(
            self.trained, vectors.flat(self.trained.values()), request.round, client, num_terms=terms,
            attempt=request.attempt, loss=mean_loss(losses), num_examples=examples,
        )  # fmt: skip

    def prescribed(self, request: Any) -> None:
        """The steps follow the rule of the round."""
        prescribe(self.client.optimizer, request.rule, f"the {request.kind} of round {request.round}")

    def steps(
        self, request: Any, client: int, losses: list[tuple[Tensor, int]]
    ) -> Generator[Message, Any, tuple[int, int]]:
        """The local steps; the loss terms and the examples behind them. A minibatch without a loss term is passed by.

        Args:
            request: What began the round.
            client: Whose.
            losses: Takes what is known of them, with the number of terms.
        """
        terms = examples = 0
        for step in range(self.local_steps):
            cohort = self.data([client], request.round * self.local_steps + step)
            examples += cohort.num_examples
            [n] = cohort.num_terms
            if n:
                loss = yield from self.local_step(request, step, cohort, self.fabric.to_device(cohort.batch))
                losses += [] if loss is None else [(loss, n)]
                terms += n
        return terms, examples

    @override
    def own_state(self, client: int) -> dict[str, Tensor] | None:
        return self.moments.moved(client)

    @override
    def load_own(self, client: int, state: dict[str, Tensor] | None) -> None:
        self.moments.put_back(client, state or {"steps": torch.tensor(0)})

    @override
    def slots(self, client: int) -> list[Tensor]:
        return super().slots(client) + self.moments.tensors(client)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moments": self.moments.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.moments.load_state_dict(state["moments"])


class WholeEndpoint(LocalEndpoint):
    """Backprop through the whole model, which the client holds; nothing is sent on the way."""

    client: ObjectiveClient
    needs = "whole"
    hold = staticmethod(whole_model)

    @override
    def make_client(self, half: nn.Module) -> ObjectiveClient:
        optimizer = ZerothOrder(self.trained.items(), self.rule)
        return ObjectiveClient(half, optimizer, self.model.loss, checkpointing=self.terms.settings["checkpointing"])

    @override
    def local_step(self, request: Any, step: int, cohort: Cohort, batch: Batch) -> Steps:
        yield from ()
        with self.fabric.autocast():
            return self.client.descend(batch)


class LocalSplitEndpoint(LocalEndpoint):
    r"""Steps through the cut: z up, λ down, ``θ_k ← rule(θ_k, ∇⟨λ, f_c(x; θ_k)⟩)``."""

    client: FirstOrderClient

    @override
    def make_client(self, half: nn.Module) -> FirstOrderClient:
        optimizer = ZerothOrder(self.trained.items(), self.rule)
        return FirstOrderClient(half, optimizer, self.terms.settings["checkpointing"])

    @override
    def local_step(self, request: Any, step: int, cohort: Cohort, batch: Batch) -> Steps:
        with self.fabric.autocast():
            anchor = self.client.forward(batch, cohort.rows)
        reply: Multiplier = yield self.smashed(cohort, anchor.z, request, step)[0]
        multiplier = cohort.multiplier(anchor.z, [reply])
        basis = Dense([p.numel() for p in self.trained.values()])
        with self.fabric.autocast():
            values = self.client.answer(batch, anchor, multiplier, cohort.rows, basis)
            self.client.optimizer.record(values[0], basis)
            self.client.optimizer.step()
        return None


def mean_loss(losses: Sequence[tuple[Tensor, int]]) -> float | None:
    """Over all loss terms; None where nothing is known."""
    terms = sum(n for _, n in losses)
    return float(torch.stack([loss * (n / terms) for loss, n in losses]).sum()) if losses else None
