"""The six steps of a round, shared by every method whose clients answer with one gradient each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hosfl_lightning.aggregation import combine
from hosfl_lightning.algorithms.base import Algorithm, Runner
from hosfl_lightning.algorithms.crossing import answered, conclude, download, upload
from hosfl_lightning.clients import Anchor, Cohort, SplitClient
from hosfl_lightning.optim import Basis
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import Multiplier, ProjectedGradients, SmashedData, Update


class SplitRound(Algorithm):
    """z up, λ down, coefficients up, one update to everybody: all clients stay bit-identical."""

    client: SplitClient
    codes_gradient = True

    @abstractmethod
    def make_client(self, module: SplitModule, seed: int) -> SplitClient:
        """The client of this method, over ``module.client_half`` and ``module.client_parameters``."""

    def training_round(self, runner: Runner, round: int, cohorts: list[Cohort]) -> Tensor:
        """Steps 2 to 6 for the sampled clients; returns the server's loss, 0-d.

        Both halves move at the very end, the server's after the update is recorded: a round that fails leaves no trace.

        Raises:
            TooFewClientsError: Too few clients sent something valid.
        """
        visits = self.gather(runner, round, cohorts)
        loss, multipliers = runner.server.backward([visit.inbox for visit in visits])
        basis = self.basis(round)
        if basis is None:
            runner.server.step()
            runner.server.end_round()
            return loss
        own = [a for visit, group in zip(visits, multipliers) for a in self.respond(runner, round, visit, group, basis)]
        update = conclude(runner, round, basis, own, self.aggregate)
        runner.server.step()
        self.client.apply(update)
        self.end_round(runner)
        return loss

    def gather(self, runner: Runner, round: int, cohorts: list[Cohort]) -> list[Visit]:
        """Step 2 of all cohorts.

        Raises:
            TooFewClientsError: Too few clients sent something valid.
        """
        visits = [self.visit(runner, round, cohort) for cohort in cohorts]
        heard = sum(runner.server.num_terms(message) > 0 for visit in visits for message in visit.inbox)
        runner.check_attendance(runner.transport.count(heard))
        return visits

    def visit(self, runner: Runner, round: int, cohort: Cohort) -> Visit:
        """Step 2: z, labels and mask of each client go up."""
        batch = runner.to_device(cohort.batch)
        with runner.autocast():
            anchor = self.client.forward(batch, cohort.rows)
        return Visit(cohort, batch, anchor, upload(runner, round, cohort, anchor.z))

    def respond(
        self, runner: Runner, round: int, visit: Visit, multipliers: list[Multiplier], basis: Basis
    ) -> list[ProjectedGradients]:
        """Steps 3 and 4: λ comes down, each client's coefficients go up."""
        if not multipliers:  # all of this cohort were refused
            return []
        cohort, heard = visit.cohort, {message.client for message in visit.inbox}
        multiplier = download(runner, cohort, visit.anchor.z, visit.inbox, multipliers)
        with runner.autocast():
            values = self.answer(visit.batch, visit.anchor, multiplier, cohort, basis)
        answers: list[ProjectedGradients] = []
        for k, v, n in zip(cohort.clients, values.cpu(), cohort.num_terms):
            if k in heard:
                answers += answered(runner, ProjectedGradients(round, k, basis.describe(), v, n))
        return [answer for answer in answers if self._honest(runner, answer, visit.inbox)]

    def _honest(self, runner: Runner, answer: ProjectedGradients, inbox: list[SmashedData]) -> bool:
        """Whether the client claims as many loss terms as its labels have; one that claims more would own the mean."""
        counted = next(runner.server.num_terms(message) for message in inbox if message.client == answer.client)
        if answer.num_terms == counted:
            return True
        runner.refuse(answer.client, f"it claims {answer.num_terms} loss terms, its labels have {counted}")
        return False

    def answer(
        self, batch: dict[str, Tensor], anchor: Anchor, multiplier: Tensor, cohort: Cohort, basis: Basis
    ) -> Tensor:
        """Step 4: ``(K, basis.size)`` coefficients."""
        return self.client.answer(batch, anchor, multiplier, cohort.rows, basis)

    def aggregate(self, answers: list[ProjectedGradients]) -> Update:
        """Step 5: ``v̄`` and everything needed to apply it."""
        return combine(answers, self.client.optimizer, self.aggregation)

    def rehearse(self, batch: dict[str, Tensor], cohort: Cohort, waiting: Callable[[], int]) -> int:
        """Forward, answer to λ, update."""
        anchor = self.client.forward(batch, cohort.rows)
        held = waiting()
        basis = self.basis(0)
        if basis is not None:
            multiplier = torch.full_like(anchor.z, 1e-3)
            values = self.client.answer(batch, anchor, multiplier, cohort.rows, basis)
            self.client.optimizer.record(values[0], basis)
            self.client.optimizer.step()
        return held


@dataclass(frozen=True)
class Visit:
    """A cohort at step 2: what it keeps while it waits for λ, and what the server received of it."""

    cohort: Cohort
    batch: dict[str, Tensor]
    anchor: Anchor
    inbox: list[SmashedData]
