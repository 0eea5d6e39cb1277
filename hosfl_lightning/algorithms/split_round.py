"""The six steps of a round, shared by every method whose clients answer with one gradient each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from hosfl_lightning.aggregation import Median, TrimmedMean, combine
from hosfl_lightning.algorithms.base import Algorithm, Runner
from hosfl_lightning.algorithms.crossing import answered, conclude, download, upload
from hosfl_lightning.callbacks.gradient_alignment import GradientAlignment, Term
from hosfl_lightning.clients import Anchor, Cohort, SplitClient
from hosfl_lightning.optim import Basis
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import Multiplier, ProjectedGradients, SmashedData, Update
from hosfl_lightning.wire.coded_gradient import ROW


class SplitRound(Algorithm):
    """z up, λ down, coefficients up, one update to everybody: all clients stay bit-identical."""

    client: SplitClient
    codes_gradient = True

    @abstractmethod
    def make_client(self, module: SplitModule, seed: int) -> SplitClient:
        """The client of this method, over ``module.client_half`` and ``module.client_parameters``."""

    def configure_callbacks(self, given: list[Callback]) -> list[Callback]:
        """As in `Algorithm`; where the server has a λ, the clients' gradients can be measured."""
        measured = self.server_order == "first"
        return super().configure_callbacks([c for c in given if not (measured and isinstance(c, GradientAlignment))])

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """As in `Algorithm`."""
        super().setup(module, seed, callbacks)
        self.alignments = [c for c in callbacks if isinstance(c, GradientAlignment)]

    def check_ternary(self) -> None:
        """Refuse that codec of a gradient where it would do harm and nobody would see it; called after `setup`.

        Raises:
            ValueError: Names the setting and the fix.
        """
        if isinstance(self.aggregation, Median | TrimmedMean):
            raise ValueError(
                f"trainer.codec.gradient: in ternary about half of a client's values are zero, and "
                f"{type(self.aggregation).__name__} makes most of the update zero; take int4, or NormClippedMean"
            )
        basis = self.basis(0)
        if basis is not None and basis.size < ROW:
            raise ValueError(
                f"trainer.codec.gradient: the {basis.size} numbers that a client sends are not fewer bytes in ternary, "
                f"which is for {ROW} and more of a gradient that it knows; leave it out"
            )

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
            self.measure(runner, round, visits, multipliers, None)
            runner.server.step()
            runner.server.end_round()
            return loss
        own = [a for visit, group in zip(visits, multipliers) for a in self.respond(runner, round, visit, group, basis)]
        update = conclude(runner, round, basis, own, self.aggregate)
        self.measure(runner, round, visits, multipliers, (basis, update.coefficients))
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

    def measure(
        self,
        runner: Runner,
        round: int,
        visits: list[Visit],
        multipliers: list[list[Multiplier]],
        update: tuple[Basis, Tensor] | None,
    ) -> None:
        """What `GradientAlignment` asks to see before either half moves; nothing of it is sent."""
        for alignment in self.alignments:
            if alignment.due(round):
                terms = [term for visit, group in zip(visits, multipliers) for term in visit.terms(group)]
                with runner.autocast():
                    alignment.measure(self.client, terms, [*runner.server.module.server_parameters.values()], update)

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

    def terms(self, multipliers: list[Multiplier]) -> list[Term]:
        """The Lagrangian terms of the clients that have a λ."""
        cohort, masks = self.cohort, {message.client: message.mask for message in self.inbox}
        parts = dict(zip(cohort.clients, zip(cohort.rows, cohort.num_terms)))
        found = []
        for message in multipliers:
            rows, num_terms = parts[message.client]
            batch = {name: tensor[rows] for name, tensor in self.batch.items()}
            multiplier = message.unpack(masks[message.client])
            padding = batch["attention_mask"].shape[1] - multiplier.shape[1]
            found.append((batch, F.pad(multiplier, (0, 0, 0, padding)), num_terms))
        return found
