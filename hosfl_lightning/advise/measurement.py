"""The measurement: the frozen client's trial, then each candidate's, then its gradient beside the warmed-up server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
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
from hosfl_lightning.advise.trials import UNSEEN, orchestrator, trial
from hosfl_lightning.algorithms import HOSFL
from hosfl_lightning.callbacks import GradientAlignment
from hosfl_lightning.clients.cohort import Minibatches
from hosfl_lightning.models import SplitModule
from hosfl_lightning.run.costs import client_costs
from hosfl_lightning.run.divergence import DivergedError
from hosfl_lightning.split import SplitError

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
    """The server that a frozen client leaves."""

    state: State
    smashed: Smashed
    decreases: Tensor
    counts: Tensor


def measure(
    trainer: Any, model: SplitModule, data: Any, known: Iterable[Candidate], rounds: int, batches: int
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
    trainer.lightning_module, trainer.datamodule = model, data
    with _as_before(trainer, model, data), isolate_rng():
        start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
        server = {name: tensor for name, tensor in start.items() if name.startswith("server_half.")}
        own = frozen(trainer.algorithm)
        runner, still = trial(trainer, model, own, "fp32", rounds, batches, "frozen client")
        found.loss, found.frozen_costs = float(still[rounds].mean()), client_costs(runner)
        warmed = _warmed(runner, model, found)
        model.load_trained_state(start)
        curves: dict[str, dict[int, Tensor]] = {}
        about: dict[str, Finding] = {}
        for one in known:
            try:
                made = one.make()
                one.algorithm.check(made)
                sizes = [p.numel() for p in one.algorithm.parameters(made).values()]
                one.algorithm.check_codecs(orchestrator(trainer, own, one.gradient, 1, []).settings.codec, sizes)
            except (SplitError, ValueError) as error:
                found.left_out[one.name] = str(error)
                continue
            begun = {n: t.clone() for n, t in made.trained_state().items()} | server
            made.load_trained_state(begun)
            try:
                _, curves[one.name] = trial(trainer, made, one.in_trial, one.gradient, rounds, batches, one.name)
            except DivergedError:
                pass
            about[one.name] = _finding(trainer, one, made, begun | warmed.state, warmed)
            made.load_trained_state(begun)
        predicted = gains(still, curves, found.planned)
        for name, one in about.items():
            told = predicted.get(name)
            found.findings.append(replace(one, gain=None if told is None else summed(told)))
    return found


def _warmed(runner: Any, model: SplitModule, found: Measurement) -> Warmed:
    """The server after the frozen client's trial, and its gradients on the rounds that would come next."""
    batches = Minibatches(runner.datamodule, model)
    cohorts = [batches(runner.sample(round), round) for round in range(found.rounds, found.rounds + found.batches)]
    smashed = server_gradients(runner, model, [one for one in cohorts if sum(one.num_terms)])
    optimizer, counts = runner.server.optimizer, resamples(len(smashed.server))
    rule = Rule.of(getattr(optimizer, "optimizer", optimizer), optimizer.param_groups[0]["lr"])
    found.noise_scale, found.examples = noise_scale(smashed.server, smashed.examples), smashed.examples
    state = {n: t.clone() for n, t in model.trained_state().items() if n.startswith("server_half.")}
    return Warmed(state, smashed, decreases(smashed.server, rule, counts), counts)


def _finding(trainer: Any, one: Candidate, model: SplitModule, begun: State, warmed: Warmed) -> Finding:
    """A real round of the candidate beside the warmed-up server, then its gradients there; all but its gain."""
    model.load_trained_state(begun)
    runner = orchestrator(trainer, one.algorithm, one.gradient, 1, [GradientAlignment(1)])
    try:
        runner.rerun(model, trainer.datamodule, UNSEEN)
    except DivergedError:
        pass
    model.load_trained_state(begun)
    client = runner.endpoint.client
    gradients = client_gradients(runner, client, warmed.smashed)
    rule, probes = Rule.of(one.algorithm.client_optimizer, one.algorithm.client_optimizer.lr), one.probes
    known = runner.callback_metrics.get("alignment/cosine")
    distribution = one.algorithm.distribution if isinstance(one.algorithm, HOSFL) else "rademacher"
    return Finding(
        name=one.name, backprop=one.backprop, probes=probes, values=gradients.shape[1], gain=None,
        share=summed(shares(decreases(gradients, rule, warmed.counts), warmed.decreases)),
        noise_scale=noise_scale(gradients, warmed.smashed.examples),
        cosine=None if probes is None else expected_cosine(probes, gradients.shape[1], distribution),
        measured_cosine=None if known is None else float(known), costs=client_costs(runner),
    )  # fmt: skip


@contextmanager
def _as_before(trainer: Any, model: SplitModule, data: Any) -> Iterator[None]:
    """What was borrowed goes back, and nothing is left in a folder."""
    held = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    root, size = trainer.default_root_dir, data.eval_batch_size
    with tempfile.TemporaryDirectory() as folder:
        trainer.default_root_dir = folder
        try:
            yield
        finally:
            trainer.default_root_dir, data.eval_batch_size = root, size
            model.load_trained_state(held)
            torch.clear_autocast_cache()
