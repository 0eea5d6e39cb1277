"""Clients that keep a part of what they train for themselves, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.aggregation import prescribe
from hosfl_lightning.clients.base import SplitClient
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.optim import Basis, Dense, OwnParameters, SharedDirections, ZerothOrder
from hosfl_lightning.split.personal import divide
from hosfl_lightning.wire import Acknowledgement, Message, Multiplier, RoundEnd, StepRequest, Update


class PersonalEndpoint(SplitEndpoint):
    r"""``StepRequest → SmashedData``, ``Multiplier → Acknowledgement``, ``RoundEnd →``; nothing of a step travels.

    ::

        client k  θ_k ← rule(θ_k, ĝ_k), in the place of answering λ; it counts once the server has taken the answer

    Where a part is shared, it is as with `SplitEndpoint`, and the same coefficients move the client's own part::

        ``Multiplier → ProjectedGradients``, ``Update →``: θ ← rule(θ, Σ_k w_k ĝ_k), and who is in the mean has moved

    What is shared comes first in the manifest, so that its numbers in the directions are those that it has alone.

    | setting | meaning |
    |---|---|
    | ``personal`` | true, or the word that names the part |
    | the others | as of `SplitEndpoint` |
    """

    noises = False  # what stays at a client moves by what was measured

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mine = list(self.trained.items())[len(self.shared) :]
        self.own = OwnParameters(ZerothOrder(mine, self.rule, seed=self.terms.seed))

    @staticmethod
    def hold(model: Any, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """As of `SplitEndpoint`, what is shared first."""
        shared, own = divide(model.client_half, model.client_parameters, settings["personal"])
        return model.client_half, shared | own

    @override
    def make_client(self, half: nn.Module) -> SplitClient:
        """The engine measures along everything that is trained; two rules move the parts of it."""
        self._shared, _ = divide(half, self.trained, self.terms.settings["personal"])
        client = super().make_client(half)
        self._rule = self.mover(self._shared, half, client.optimizer)
        return client

    @property
    @override
    def shared(self) -> dict[str, nn.Parameter]:
        return self._shared

    # ---- a round

    @override
    def forward(self, requests: Sequence[StepRequest]) -> list[Message]:
        [request] = requests
        prescribe(self.own.optimizer, request.rule, f"the request of round {request.round}")
        with self.own.holding(request.client):
            return super().forward(requests)

    @override
    def answer(self, multipliers: Sequence[Multiplier]) -> list[Message]:
        """Step 4: the client moves what is its own, and says so; or sends what moves the rest."""
        [request] = multipliers
        with self.own.holding(request.client):
            [answer] = self.measured(multipliers)
        finite = bool(answer.coefficients.isfinite().all())
        if finite and answer.num_terms:
            self.move(request.client, request.round, answer.coefficients)
        if not self.shared:
            return [Acknowledgement(request.round, request.client, request.attempt, finite)]
        shared, _, _ = self.parts(request.round)
        return [self._coded(replace(answer, coefficients=answer.coefficients[shared]))]

    def move(self, client: int, round: int, coefficients: Tensor) -> None:
        """``θ_k ← rule(θ_k, ĝ_k)``, for the time being."""
        _, mine, basis = self.parts(round)
        # A simulation has one half for all: graphs of other clients, with values of theirs, may be waiting for λ.
        known = torch.autograd._unsafe_preserve_version_counter(tuple(self.own.optimizer.parameters))
        with self.own.of(client), known:
            self.own.optimizer.record(coefficients[mine], basis)
            self.own.optimizer.step()

    def parts(self, round: int) -> tuple[slice, slice, Basis]:
        """Which coefficients are of what is shared and which of the client's own, and in what these are expressed."""
        basis, sizes = self.basis(round), [p.numel() for p in self.own.optimizer.parameters]
        if isinstance(basis, SharedDirections):
            return slice(None), slice(None), basis.after(len(self.shared))
        if isinstance(basis, Dense):
            shared = sum(p.numel() for p in self.shared.values())
            return slice(shared), slice(shared, None), Dense(sizes)
        return slice(0), slice(None), basis  # nothing is shared

    @override
    def apply(self, message: Update) -> None:
        self.own.commit([client for client, w in zip(message.participants, message.weights) if w])
        super().apply(message)

    @override
    def end(self, message: RoundEnd) -> None:
        self.forget()
        self.own.commit(message.counted)

    # ---- what is kept

    @override
    def own_parameters(self) -> dict[int, dict[str, Tensor]]:
        names = list(self.trained)[len(self.shared) :]
        return {k: {names[i]: theta for i, theta in self.own.values(k).items()} for k in self.own.held}

    @override
    def slots(self, client: int) -> list[Tensor]:
        shared = [t for held in self.shared_rule.state.values() for t in held.values()]
        return shared + self.own.tensors(client)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"client_optimizer": self.shared_rule.state_dict(), "own": self.own.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shared_rule.load_state_dict(state["client_optimizer"])
        self.own.load_state_dict(state["own"])
