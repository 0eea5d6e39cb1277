"""What a run folder says of a run in which clients were away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.availability import Trace
from hosfl_lightning.callbacks import Budget
from hosfl_lightning.compare.runs import Run
from tests.conftest import RandomTokens

ONLINE = [[0, 1, 2], [0, 1], [2]]
CLIENT_ROUNDS = 6


@pytest.mark.parametrize("callbacks", [[], [Budget]], ids=["plain", "Budget"])
def test_costs_are_those_of_the_clients_that_were_there(
    make_orchestrator: Callable[..., Any], make_model: Callable[..., Any], data: RandomTokens, callbacks: list[Any]
) -> None:
    trainer = make_orchestrator(availability=Trace(ONLINE), callbacks=[one() for one in callbacks])
    trainer.fit(make_model(), data)
    folder = Path(trainer.log_dir)
    (folder / "config.yaml").write_text("{}")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["client_rounds"] == CLIENT_ROUNDS
    costs = Run(folder).costs
    for way in ("up", "down"):
        assert costs[f"bytes_{way}_per_client_round"] == summary[f"bytes_{way}"] / CLIENT_ROUNDS
    forwards = CLIENT_ROUNDS * summary["client_forwards_per_round"]
    assert costs["client_forwards"] == pytest.approx(forwards)
    (folder / "summary.json").write_text(json.dumps({**summary, "client_rounds": 2 * CLIENT_ROUNDS}))
    counted = 1 if callbacks else 2  # what was counted round by round is not reckoned anew
    assert Run(folder).costs["client_forwards"] == pytest.approx(counted * forwards)


def test_what_was_not_measured_is_not_made_up(
    make_orchestrator: Callable[..., Any], make_model: Callable[..., Any], data: RandomTokens
) -> None:
    trainer = make_orchestrator(max_rounds=1)
    trainer.fit(make_model(), data)
    folder = Path(trainer.log_dir)
    (folder / "config.yaml").write_text("{}")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["client_rounds"]
    (folder / "summary.json").write_text(json.dumps(summary))
    costs = Run(folder).costs
    assert costs["bytes_up"] is not None
    assert [costs[f"bytes_{way}_per_client_round"] for way in ("up", "down")] == [None, None]
    assert costs["client_forwards"] is None
