"""Clients that send the smashed data of their probes: what a probe changes is the loss, and the server sees it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.algorithms.shared_scalars import SharedScalars
from hosfl_lightning.clients.probed_endpoint import SIDES, ProbedEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Inbox, Server
from hosfl_lightning.wire import ProbedData, ProbeRequest, ProjectedGradients, SmashedData


class TwoPoint(SharedScalars):
    r"""``v_kp = (ℓ_k(θ + μ u_p) − ℓ_k(θ − μ u_p)) / 2μ``, where the server evaluates ``ℓ_k`` on probed smashed data.

    Neither λ nor ``v_kp`` travels: the server has both losses, and sends ``v̄_p`` to everybody. What a codec rounds off
    z is in the losses and is divided by ``2μ``, so a coarse one needs a larger ``μ``.

    Args:
        probes: ``P``, directions a round.
        mu: ``μ``, smoothing length.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.

    Raises:
        ValueError: For a setting out of range.
    """

    endpoint = ProbedEndpoint
    #: Whether the first z of a round is that of the first side of the first probe.
    probe_first = False

    def __init__(self, probes: int = 2, mu: float = 1e-3, distribution: str = "rademacher", **kwargs: Any) -> None:
        super().__init__(probes=probes, mu=mu, estimator="central", distribution=distribution, **kwargs)

    @override
    def client_settings(self) -> dict[str, Any]:
        return {**super().client_settings(), "probe_first": self.probe_first}

    def server_at(self, round: int, probe: int, scale: float) -> AbstractContextManager[None]:
        """While it is open the server evaluates what the clients sent of ``θ_c + scale · u_p``: at θ_s itself."""
        return nullcontext()

    def losses(self, server: Server, fleet: Fleet, call: Call, inbox: Inbox) -> dict[int, Tensor]:
        """``ℓ_k`` at both sides of every probe, ``(P, 2)`` fp64, of each client that is heard to the end.

        One without a loss term is not asked: zeros.
        """
        held = {message.client: message for message in inbox.messages if inbox.num_terms[message.client]}
        seen: dict[int, list[Tensor]] = {client: [] for client in held}
        for probe, side in product(range(self.probes), range(len(SIDES))):
            held = self.probed(server, fleet, call, held, probe, side)
            with self.server_at(call.round, probe, SIDES[side] * server.client_rule.mu):
                for client, message in held.items():
                    seen[client].append(server.loss(message))
        silent = {client: torch.zeros(self.probes, 2) for client, terms in inbox.num_terms.items() if not terms}
        return silent | {client: torch.stack(seen[client]).view(-1, 2).cpu() for client in held}

    def probed(
        self, server: Server, fleet: Fleet, call: Call, held: dict[int, SmashedData], probe: int, side: int
    ) -> dict[int, SmashedData]:
        """What the server holds of some clients, with z of one side of a probe in place of the one before."""
        requests = {client: ProbeRequest(call.round, client, probe, side, call.attempt) for client in held}
        arrived: list[ProbedData] = fleet.ask(requests, ProbedData)
        return {m.client: m for m in server.fitting([held[p.client].with_z(p.z) for p in arrived])}

    def answers(self, server: Server, inbox: Inbox, losses: dict[int, Tensor]) -> Sequence[ProjectedGradients]:
        """``v_kp`` of the clients in ``losses``, made by the server itself: they are in no ledger."""
        basis, answers = self.basis(0, server.call.round, ()), []
        for message in inbox.messages:
            if (at := losses.get(message.client)) is not None:
                values = ((at[:, 0] - at[:, 1]) / (2 * server.client_rule.mu)).float()
                terms = inbox.num_terms[message.client]
                answers.append(ProjectedGradients(message.round, message.client, basis.describe(), values, terms))
        return answers
