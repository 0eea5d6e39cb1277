"""HERON-SFL: clients that never backpropagate, with a loss of their own through an auxiliary head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.aggregation import AggregationRule, combine
from hosfl_lightning.algorithms.auxiliary_training import AuxiliaryTraining
from hosfl_lightning.algorithms.base import Runner
from hosfl_lightning.algorithms.crossing import conclude, mean_loss, taken
from hosfl_lightning.clients import AuxiliaryClient, AuxiliaryHalf, Cohort
from hosfl_lightning.optim import Basis, LocalWalk, SharedDirections, UpdateRule, ZerothOrder, check_linear
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import ProjectedGradients, Update

#: Of one round: the generator's counter has 12 bits for them.
MAX_PROBES = 4096


class HERONSFL(AuxiliaryTraining):
    r"""Zeroth-order local steps on the client's own loss ``F(θ)``, ``θ = (θ_c, θ_a)``; the server backpropagates on z.

    ::

        client k, step e   ĝ = (1/P) Σ_p (d/μ) (F(θ_k + μ u_p) − F(θ_k)) u_p,   u_p on the unit sphere in R^d
                           θ_k ← rule(θ_k, ĝ)
        every k-th step    z goes up;  θ_s ← rule(θ_s, ∂ℓ/∂θ_s)
        all                θ ← Σ_k w_k θ_k

    Every client draws directions of its own, which are gauss16 ones over their length. A local step is ``P + 1``
    forwards at inference memory. The paper's figures, ResNet-18 on CIFAR-10 with 5 clients: a client peaks at 259 MB
    (SplitFed 710, CSE-FSL and FSL-SAGE 726), 39.9 GFLOP a step (59.5), 244 GB of traffic (SplitFedV2 391).
    GPT2-medium on E2E with 3 clients: 4.03 GB (SplitLoRA 4.59).

    With ``scalars``, which the paper does not have, all clients draw the same directions and walk by plain SGD. The
    mean of their weights then follows from the mean of their coefficients::

        θ − lr (1/P) Σ_ep (Σ_k w_k c_kep) g_ep,   c = (d/‖g‖²)(F(θ + μ g/‖g‖) − F(θ)) ‖g‖/μ

    so ``local_steps · P`` scalars travel in the place of θ, and the update log, replay and clients that were away work
    as in HO-SFL.

    Args:
        probes: ``P``, directions a local step.
        mu: ``μ``, length of the step along a direction.
        client_optimizer: As in `Algorithm`.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `LocalTraining`; with scalars over coefficients.
        local_steps: As in `LocalTraining`.
        upload_every: As in `AuxiliaryTraining`.
        auxiliary_blocks: As in `AuxiliaryTraining`.
        scalars: Scalars and shared directions in the place of full vectors.

    Raises:
        ValueError: For a setting out of range; with scalars, for another rule than plain SGD.

    Reference: HERON-SFL, arXiv 2601.09076.
    """

    def __init__(
        self,
        probes: int = 1,
        mu: float = 1e-3,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
        local_steps: int = 1,
        upload_every: int = 1,
        auxiliary_blocks: int = 0,
        scalars: bool = False,
    ) -> None:
        super().__init__(
            client_optimizer, client_scheduler, aggregation, local_steps,
            upload_every=upload_every, auxiliary_blocks=auxiliary_blocks,
        )  # fmt: skip
        check_probe_settings(probes, mu, "forward", "gauss16")
        if local_steps * probes > MAX_PROBES:
            raise ValueError(
                f"trainer.algorithm: local_steps={local_steps} with probes={probes} are {local_steps * probes} "
                f"directions a round, the generator has {MAX_PROBES}; lower one of them"
            )
        if scalars:
            check_linear(self.client_optimizer, "HERONSFL with scalars=true")
        self.probes, self.mu, self.scalars, self.records = probes, mu, scalars, scalars
        self._walk: LocalWalk | None = None

    def make_client(self, module: SplitModule, seed: int) -> AuxiliaryClient:
        """An `AuxiliaryClient` that does not backpropagate, with layer-wise probes."""
        half = AuxiliaryHalf(module.client_half, self.head(module)[0])
        optimizer = ZerothOrder(
            self.parameters(module).items(), self.client_optimizer, module=half, probes=self.probes, mu=self.mu,
            distribution="gauss16", seed=seed,
        )  # fmt: skip
        return AuxiliaryClient(half, optimizer, module.loss, backprop=False)

    def basis(self, round: int) -> Basis | None:
        """``SharedDirections`` of all local steps of the round, with scalars."""
        return self.directions(round) if self.scalars else None

    def directions(self, round: int, client: int | None = None) -> SharedDirections:
        """Of all local steps of the round, ``P`` each: those that all share, or a client's own."""
        shared = self.client.optimizer.basis(round, self.local_steps * self.probes)
        own = copy(shared)
        own.streams = [replace(stream, client=client) for stream in shared.streams]
        return own

    def local_step(self, runner: Runner, round: int, step: int, cohort: Cohort) -> Tensor | None:
        """As in `LocalTraining`; the loss is F."""
        batch = runner.to_device(cohort.batch)
        with runner.autocast():
            z, loss = self.client.forward(batch)
        if self.exchange(runner, round, step, cohort, z) is None:
            return None
        del z  # the server has it
        with runner.autocast():
            self.descend(batch, loss, round, step, cohort.clients[0])
        return loss

    def descend(self, batch: dict[str, Tensor], loss: Tensor, round: int, step: int, client: int) -> None:
        """``θ ← rule(θ, ĝ)``.

        Args:
            batch: Of the step.
            loss: ``F(θ)``.
            round: The round.
            step: The local step.
            client: Whose.
        """
        everything = self.directions(round, None if self.scalars else client)
        directions = everything.part(step * self.probes, self.probes)
        values = self.client.probe(batch, loss, directions, self.mu)
        if self._walk is not None:
            self._walk.move(step, values)
            return
        self.client.optimizer.record(values, directions)
        self.client.optimizer.step()

    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        """As in `LocalTraining`; with scalars, θ moves by one update that everybody applies."""
        if not self.scalars:
            return super().training_round(runner, round, cohorts)
        basis, server, losses = self.directions(round), runner.server.state(), dict[int, float]()
        try:
            own = [answer for cohort in cohorts for answer in self.walk(runner, round, cohort, losses)]
            update = conclude(runner, round, basis, own, self.aggregate)
        except BaseException:
            runner.server.put(*server)
            raise
        self.client.apply(update)
        self.end_round(runner)
        return mean_loss(runner, update, losses)

    def aggregate(self, answers: list[ProjectedGradients]) -> Update:
        """The clients' coefficients as one update."""
        return combine(answers, self.client.optimizer, self.aggregation, self.mu)

    def walk(self, runner: Runner, round: int, cohort: Cohort, losses: dict[int, float]) -> list[ProjectedGradients]:
        """Local steps, then scalars up, θ where it was; what the server takes of them: one message, or none."""
        client, total, terms = cohort.clients[0], 0.0, 0
        with self.walking(round) as walk:
            for step in range(self.local_steps):
                minibatch = runner.minibatch(client, round * self.local_steps + step) if step else cohort
                [n] = minibatch.num_terms
                if not n:
                    continue
                loss = self.local_step(runner, round, step, minibatch)
                if loss is None:
                    return []
                total, terms = total + n * float(loss), terms + n
        losses[client] = total / max(terms, 1)
        return taken(runner, ProjectedGradients(round, client, walk.basis.describe(), walk.coefficients, terms))

    @contextmanager
    def walking(self, round: int) -> Iterator[LocalWalk]:
        """Local steps inside are a client's walk."""
        with LocalWalk(self.client.optimizer, self.directions(round), self.local_steps) as walk:
            self._walk = walk
            try:
                yield walk
            finally:
                self._walk = None

    def rehearse(self, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int]) -> int:
        """The local steps, and with scalars the update; nobody is waited for."""
        with self.walking(0) if self.scalars else nullcontext() as walk:
            for step in range(self.local_steps):
                loss = self.client.forward(batch)[1]
                self.descend(batch, loss, 0, step, cohort.clients[0])
        if walk is not None:
            self.client.optimizer.record(walk.coefficients, walk.basis)
            self.client.optimizer.step()
        return 0

    def settings(self) -> dict[str, Any]:
        """As in `AuxiliaryTraining`, and the probes'."""
        return {**super().settings(), "probes": self.probes, "mu": self.mu, "scalars": self.scalars}
