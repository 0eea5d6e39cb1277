from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import SplitFedV2
from hosfl_lightning.callbacks import Budget, PeakMemoryMonitor
from hosfl_lightning.optim import SGD
from tests.callbacks.drop_in.plain_modules import fit as fit_plain
from tests.callbacks.drop_in.plain_modules import mlp
from tests.conftest import RandomTokens

Make = Callable[..., Any]
EXAMPLES = 12  # of a round: three clients, four of each


def fit(make: Make, model: SplitCausalLM, data: RandomTokens, budget: Budget, **settings: Any) -> Orchestrator:
    trainer = make(settings.pop("algorithm", None), **{"callbacks": [budget], "max_rounds": 6, **settings})
    trainer.fit(model, data)
    return trainer


def rows(trainer: Orchestrator) -> list[dict[str, str]]:
    return list(csv.DictReader((Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()))[1:]


def test_what_a_round_spends(make_orchestrator: Make, make_model: Make, data: RandomTokens) -> None:
    budget = Budget()
    trainer = fit(make_orchestrator, make_model(), data, budget)
    monitor = next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor))
    spent = rows(trainer)
    assert [float(row["budget/samples"]) for row in spent] == [EXAMPLES * n for n in range(1, 7)]
    forwards = [3 * n * monitor.report["client_forwards"] for n in range(1, 7)]
    assert [float(row["budget/client_forwards"]) for row in spent] == pytest.approx(forwards)
    assert budget.spent["bytes"] == float(spent[-1]["comm/total_bytes"])


def test_local_steps_count(make_orchestrator: Make, make_model: Make, data: RandomTokens) -> None:
    method = SplitFedV2(client_optimizer=SGD(lr=0.1), local_steps=2)
    budget = Budget(samples=2 * EXAMPLES + 1)
    trainer = fit(make_orchestrator, make_model(), data, budget, algorithm=method)
    assert (trainer.global_step, budget.spent["samples"]) == (2, 4 * EXAMPLES)


@pytest.mark.parametrize("kind", ["samples", "bytes", "client_forwards"])
def test_the_round_that_reaches_the_limit_is_the_last(
    make_orchestrator: Make, make_model: Make, data: RandomTokens, kind: str
) -> None:
    whole = Budget()
    fit(make_orchestrator, make_model(), data, whole, max_rounds=2)
    limited = Budget(**{kind: whole.spent[kind]})
    trainer = fit(make_orchestrator, make_model(), data, limited)
    assert trainer.global_step == 2
    assert limited.spent == whole.spent
    beyond = Budget(**{kind: whole.spent[kind] + 1})
    assert fit(make_orchestrator, make_model(), data, beyond).global_step == 3


def test_a_resumed_run_goes_on_counting(make_orchestrator: Make, make_model: Make, data: RandomTokens) -> None:
    first = make_orchestrator(callbacks=[Budget()], max_rounds=2, enable_checkpointing=True)
    first.fit(make_model(), data)
    budget = Budget(samples=4 * EXAMPLES)
    trainer = make_orchestrator(callbacks=[budget], max_rounds=6, enable_checkpointing=True)
    trainer.fit(make_model(), data, ckpt_path=first.log_dir)
    assert (trainer.global_step, budget.spent["samples"]) == (4, 4 * EXAMPLES)


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="samples=0: a budget must be above 0"):
        Budget(samples=0)


def test_a_plain_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match="Budget works on the rounds of an Orchestrator; remove it from this Trainer"):
        fit_plain(mlp(), Budget(samples=1))
