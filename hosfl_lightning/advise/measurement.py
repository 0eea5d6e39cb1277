"""The measurement: the frozen client's trial, then each candidate's, then its gradient beside the warmed-up server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from hosfl_lightning.advise.candidates import Candidate, frozen
from hosfl_lightning.advise.cosine import expected_cosine
from hosfl_lightning.advise.gradients import (
    Rule,
    Smashed,
    client_gradients,
    decreases,
    noise_scale,
    resamples,
    server_gradients,
    shares,
)
from hosfl_lightning.advise.ranking import Finding, gains, summed
from hosfl_lightning.advise.trials import UNSEEN, Trials
from hosfl_lightning.algorithms import HOSFL
from hosfl_lightning.callbacks import GradientAlignment
from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.models import SplitModule
from hosfl_lightning.run.costs import client_costs
from hosfl_lightning.run.divergence import DIVERGED
from hosfl_lightning.split import SplitError
from hosfl_lightning.wire import Codecs

State = dict[str, Tensor]


@dataclass
class Measurement:
    """What there is to advise from.

    Attributes:
        rounds: Of each trial.
        batches: Rounds whose gradients were measured.
        planned: The recipe's rounds.
        loss: The frozen client's, held out, at the end of its trial.
        noise_scale: Of the server's gradient, in examples.
        examples: Of a round.
        frozen_costs: Of a client that does nothing.
        findings: Of each candidate that there can be.
        left_out: Why there cannot be another, by name.
    """

    rounds: int
    batches: int
    planned: int
    loss: float = 0.0
    noise_scale: float | None = None
    examples: float = 0.0
    frozen_costs: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Warmed:
    """The server that a frozen client leaves.

    Attributes:
        state: Of the server's half.
        smashed: Its gradients on the rounds that would come next.
        decreases: Of one step of its own, by resample.
        counts: The resamples.
    """

    state: State
    smashed: Smashed
    decreases: Tensor
    counts: Tensor


def measure(
    trainer: Any,
    model: SplitModule,
    data: FederatedDataModule,
    known: Iterable[Candidate],
    rounds: int,
    batches: int,
) -> Measurement:
    """All of it; model, data and random state end as they were, and nothing is written.

    Args:
        trainer: The recipe's.
        model: Untrained.
        data: Of the recipe.
        known: The candidates.
        rounds: Of a trial, even.
        batches: Rounds whose gradients are measured, and held-out batches that are scored.
    """
    found = Measurement(rounds, batches, trainer.settings.max_rounds)
    with isolate_rng(), _as_before(model, data) as start, tempfile.TemporaryDirectory() as folder:
        trials = Trials(trainer, data, rounds, batches, folder)
        runner, still = trials.run(model, frozen(trainer.algorithm), "fp32", "frozen client")
        found.loss, found.frozen_costs = float(still[rounds].mean()), client_costs(runner)
        warmed = _warmed(runner, model, found)
        model.load_trained_state(start)
        curves: dict[str, dict[int, Tensor]] = {}
        about = []
        for one in known:
            try:
                made = _made(one, trainer.settings.codec)
            except (SplitError, ValueError) as error:
                found.left_out[one.name] = str(error)
                continue
            begun = {name: t.clone() for name, t in made.trained_state().items()} | _server(start)
            made.load_trained_state(begun)
            with suppress(*DIVERGED):
                _, curves[one.name] = trials.run(made, one.in_trial, one.gradient, one.name)
            about.append(_finding(trials, one, made, begun | warmed.state, warmed))
            made.load_trained_state(begun)
        predicted = {name: summed(values) for name, values in gains(still, curves, found.planned).items()}
    found.findings = [replace(one, gain=predicted.get(one.name)) for one in about]
    return found


def _made(one: Candidate, codecs: Codecs) -> SplitModule:
    """The candidate's model, which its method can train.

    Raises:
        SplitError: There is none.
        ValueError: It cannot.
    """
    made = one.make()
    one.algorithm.check(made)
    sizes = [p.numel() for p in one.algorithm.parameters(made).values()]
    one.algorithm.check_codecs(replace(codecs, gradient=one.gradient), sizes)
    return made


def _server(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("server_half.")}


def _warmed(runner: Any, model: SplitModule, found: Measurement) -> Warmed:
    """The server after the frozen client's trial, and its gradients on the rounds that would come next."""
    batches = Minibatches(runner.datamodule, model)
    cohorts = [batches(runner.sample(round), round) for round in range(found.rounds, found.rounds + found.batches)]
    smashed = server_gradients(runner, model, [one for one in cohorts if sum(one.num_terms)])
    optimizer, counts = runner.server.optimizer, resamples(len(smashed.server))
    rule = Rule.of(getattr(optimizer, "optimizer", optimizer), optimizer.param_groups[0]["lr"])
    found.noise_scale, found.examples = noise_scale(smashed.server, smashed.examples), smashed.examples
    state = {name: t.clone() for name, t in _server(model.trained_state()).items()}
    return Warmed(state, smashed, decreases(smashed.server, rule, counts), counts)


def _finding(trials: Trials, one: Candidate, model: SplitModule, begun: State, warmed: Warmed) -> Finding:
    """A real round of the candidate beside the warmed-up server, then its gradients there; all but its gain."""
    model.load_trained_state(begun)
    runner: Any = trials.orchestrator(one.algorithm, one.gradient, 1, [GradientAlignment(1)])
    with suppress(*DIVERGED):
        runner.rerun(model, trials.data, UNSEEN)
    model.load_trained_state(begun)
    gradients = client_gradients(runner, runner.endpoint.client, warmed.smashed)
    own, probes = one.algorithm.client_optimizer, one.probes
    seen = runner.callback_metrics.get("alignment/cosine")
    distribution = one.algorithm.distribution if isinstance(one.algorithm, HOSFL) else "rademacher"
    return Finding(
        name=one.name, backprop=one.backprop, probes=probes, values=gradients.shape[1], gain=None,
        share=summed(shares(decreases(gradients, Rule.of(own, own.lr), warmed.counts), warmed.decreases)),
        noise_scale=noise_scale(gradients, warmed.smashed.examples),
        cosine=None if probes is None else expected_cosine(probes, gradients.shape[1], distribution),
        measured_cosine=None if seen is None else float(seen), costs=client_costs(runner),
    )  # fmt: skip


@contextmanager
def _as_before(model: SplitModule, data: FederatedDataModule) -> Iterator[State]:
    """What is borrowed is given back; the start of what is trained."""
    held = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    size = data.eval_batch_size
    try:
        yield held
    finally:
        data.eval_batch_size = size
        model.load_trained_state(held)
