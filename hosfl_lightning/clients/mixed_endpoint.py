"""Clients of different strength in one run: each answers λ as well as it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from hosfl_lightning.clients.base import SplitClient
from hosfl_lightning.clients.first_order import FirstOrderClient
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.optim import Basis, Dense, SharedDirections
from hosfl_lightning.wire import Message, Multiplier


class MixedEndpoint(SplitEndpoint):
    r"""As `SplitEndpoint`, by the kind of each client; all of them apply the same update.

    | setting | meaning |
    |---|---|
    | ``kinds`` | as ``kind`` of `SplitEndpoint`, several |
    | ``probes_of`` | directions of each kind; 0 where it does not probe |
    | ``kind_of`` | of each client, which of them it is |
    | ``mu, estimator, distribution, taps, checkpointing`` | of the kinds that have such a setting |
    """

    noises = False  # its kinds answer in vectors of different length

    @override
    def make_client(self, half: nn.Module) -> SplitClient:
        """One half, and an engine over it for each kind; the first that moves it applies the updates for all."""
        kinds = self.terms.settings["kinds"]
        # The last one that is made says whether a tensor asks for a gradient; only backprop needs that it does.
        made = {kind: self.engine(half, kind) for kind in sorted(set(kinds), key="first_order".__eq__)}
        self.engines = [made[kind] for kind in kinds]
        return self.engines[0]

    @override
    def engine_of(self, client: int) -> SplitClient:
        return self.engines[self.kind_of(client)]

    @override
    def answered_in(self, client: int, round: int) -> Basis | None:
        return basis_of_kind(self.terms.settings, self.kind_of(client), self.terms.seed, round, self.sizes)

    @override
    def respond(self, requests: Sequence[Any]) -> list[Message]:
        """Clients of one kind run as one batch."""
        kinds = [self.kind_of(request.client) for request in requests]
        answers: dict[int, Message] = {}
        for kind in dict.fromkeys(kinds):
            group = [request for request, own in zip(requests, kinds) if own == kind]
            answers |= {request.client: answer for request, answer in zip(group, super().respond(group))}
        return [answers[request.client] for request in requests]

    @override
    def answer(self, multipliers: Sequence[Multiplier]) -> list[Message]:
        """On machines of their own, who probes changes no weights under a graph that another has kept."""
        if isinstance(self.engine_of(multipliers[0].client), FirstOrderClient):
            return super().answer(multipliers)
        # Here they share one half. Probes leave the bits as they were, so a graph may go on with them.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.trained.values())):
            return super().answer(multipliers)

    def kind_of(self, client: int) -> int:
        """The number of a client's kind."""
        return self.terms.settings["kind_of"][client]

    @property
    def sizes(self) -> list[int]:
        """Elements of each trained tensor."""
        return [p.numel() for p in self.trained.values()]


def basis_of_kind(
    settings: dict[str, Any], kind: int, seed: int, round: int, sizes: Sequence[int]
) -> SharedDirections | Dense | None:
    """In what a client of that kind answers; None: it does not."""
    if settings["kinds"][kind] == "frozen":
        return None
    probes = settings["probes_of"][kind]
    return SharedDirections(seed, round, probes, settings["distribution"]) if probes else Dense(sizes)
