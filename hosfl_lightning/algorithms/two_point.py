"""Clients that send the smashed data of their probes: what a probe changes is the loss, and the server sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product

import torch
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.base import Runner
from hosfl_lightning.algorithms.crossing import upload_probe
from hosfl_lightning.algorithms.shared_scalars import SharedScalars
from hosfl_lightning.algorithms.split_round import SplitRound, Visit
from hosfl_lightning.clients import Cohort, ForwardOnlyClient
from hosfl_lightning.optim import SharedDirections, UpdateRule
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import ProjectedGradients, SmashedData

SIDES = (1, -1)
"""Of a probe: ``θ + μu``, ``θ − μu``."""


class TwoPoint(SharedScalars, SplitRound):
    r"""``v_kp = (ℓ_k(θ + μ u_p) − ℓ_k(θ − μ u_p)) / 2μ``, where the server evaluates ``ℓ_k`` on probed smashed data.

    Neither λ nor ``v_kp`` travels: the server has both losses, and sends ``v̄_p`` to everybody. What a codec rounds off
    z is in the losses and is divided by ``2μ``, so a coarse one needs a larger ``μ``.

    Args:
        probes: ``P``, directions a round.
        mu: ``μ``, smoothing length.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        client_optimizer: Update rule on θ_c.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `Algorithm`.

    Raises:
        ValueError: For a setting out of range.
    """

    client: ForwardOnlyClient
    codes_gradient = False

    def __init__(
        self,
        probes: int = 2,
        mu: float = 1e-3,
        distribution: str = "rademacher",
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
    ) -> None:
        super().__init__(probes, mu, "central", distribution, client_optimizer, client_scheduler, aggregation)

    def make_client(self, module: SplitModule, seed: int) -> ForwardOnlyClient:
        """A `ForwardOnlyClient` with layer-wise probes."""
        half = module.client_half
        return ForwardOnlyClient(half, self.zeroth_order(module.client_parameters, self.client_optimizer, half, seed))

    def server_at(self, basis: SharedDirections, probe: int, scale: float) -> AbstractContextManager[None]:
        """While it is open the server evaluates what the clients sent of ``θ_c + scale · u_p``: at θ_s itself."""
        return nullcontext()

    def losses(self, runner: Runner, visit: Visit, basis: SharedDirections) -> dict[int, Tensor]:
        """``ℓ_k`` at both sides of every probe, ``(P, 2)`` fp64, of each client that is heard to the end.

        One without a loss term is not asked: zeros.
        """
        count = runner.server.num_terms
        inbox = [message for message in visit.inbox if count(message)]
        seen: dict[int, list[Tensor]] = {message.client: [] for message in inbox}
        for probe, side in product(range(basis.size), range(len(SIDES))):
            inbox = self.probed(runner, visit, inbox, basis, probe, side)
            with self.server_at(basis, probe, SIDES[side] * self.client.optimizer.mu):
                for message in inbox:
                    seen[message.client].append(runner.server.loss(message))
        silent = {message.client: torch.zeros(basis.size, 2) for message in visit.inbox if not count(message)}
        return silent | {m.client: torch.stack(seen[m.client]).view(-1, 2).cpu() for m in inbox}

    def probed(
        self,
        runner: Runner,
        visit: Visit,
        inbox: Sequence[SmashedData],
        basis: SharedDirections,
        probe: int,
        side: int,
    ) -> list[SmashedData]:
        """What the clients of ``inbox`` send of one side of a probe."""
        if not inbox:
            return []
        with runner.autocast():
            z = self.client.probe(visit.batch, basis, probe, SIDES[side] * self.client.optimizer.mu)
        return upload_probe(runner, visit.cohort, z, inbox, probe, side)

    def answers(
        self, runner: Runner, visit: Visit, losses: dict[int, Tensor], basis: SharedDirections
    ) -> list[ProjectedGradients]:
        """``v_kp`` of the clients in ``losses``, made by the server itself: they are in no ledger."""
        answers = []
        for message in visit.inbox:
            if (at := losses.get(message.client)) is not None:
                values = ((at[:, 0] - at[:, 1]) / (2 * self.client.optimizer.mu)).float()
                terms = runner.server.num_terms(message)
                answers.append(ProjectedGradients(message.round, message.client, basis.describe(), values, terms))
        return answers

    def rehearse(self, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int]) -> int:
        """Both sides of every probe, then the update, for which the client waits with nothing in its hands."""
        optimizer, basis = self.client.optimizer, self.directions(0)
        for probe, sign in product(range(basis.size), SIDES):
            self.client.probe(batch, basis, probe, sign * optimizer.mu)
        held = waiting()
        optimizer.record(torch.full((basis.size,), 1e-3), basis)
        optimizer.step()
        return held
