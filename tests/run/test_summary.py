from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hosfl_lightning.run.result import Evaluation, RunResult
from hosfl_lightning.run.summary import gap_closed, size


def run(losses: list[float]) -> RunResult:
    evaluation = Evaluation({"val/loss": sum(losses) / len(losses)}, losses)
    return RunResult(evaluation, evaluation)


FROZEN, FIRST_ORDER = run([3.0, 3.2, 3.4]), run([2.0, 2.2, 2.4])


@pytest.mark.parametrize(("method", "expected"), [(3.2, 0.0), (2.2, 1.0), (2.7, 0.5), (3.7, -0.5)])
def test_gap_closed_is_the_recovered_fraction(method: float, expected: float) -> None:
    assert gap_closed(run([method] * 3), FROZEN, FIRST_ORDER) == pytest.approx(expected)


def test_no_gap_where_the_controls_cannot_be_told_apart() -> None:
    noisy = run([3.0, 3.3, 3.2])  # 0.033 above FROZEN's mean in the right direction, but within the noise of pairs
    assert gap_closed(run([3.1] * 3), FROZEN, noisy) is None
    assert gap_closed(run([2.7] * 3), FIRST_ORDER, FROZEN) is None
    assert gap_closed(run([2.7]), run([3.0]), run([2.0])) is None  # one batch has no standard error


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_no_gap_where_a_loss_is_no_number(loss: float) -> None:
    diverged = run([loss] * 3)
    assert gap_closed(diverged, FROZEN, FIRST_ORDER) is None
    assert gap_closed(FROZEN, diverged, FIRST_ORDER) is None
    assert gap_closed(FROZEN, FROZEN, diverged) is None


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
@pytest.mark.filterwarnings("ignore:round 1. the server half is not finite")
def test_a_run_that_diverges_leaves_json_without_nan(
    make_model: Callable[..., Any], make_orchestrator: Callable[..., Any], data: Any
) -> None:
    """NaN and Infinity are no JSON; readers other than Python's refuse the file."""

    def far(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e30)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in summary.json")

    trainer = make_orchestrator(max_rounds=1, controls=["frozen", "first_order"])
    trainer.fit(make_model(optimizer=far), data)
    summary = json.loads((Path(trainer.log_dir) / "summary.json").read_text(), parse_constant=refuse)
    assert math.isfinite(summary["val_loss_first"])
    assert summary["val_loss_last"] is summary["metrics_last"]["val/perplexity"] is summary["gap_closed"] is None
    assert [one["val_loss_last"] for one in summary["controls"].values()] == [None, None]
    assert trainer.summary == summary


def test_size() -> None:
    assert [size(v) for v in (12, 2048, 3 * 2**20, 5 * 2**30)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.00 GiB"]
