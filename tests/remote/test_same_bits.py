"""Clients at the end of a line, in ranks, and in one process: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fleet.test_pipe import CASES
from tests.remote.test_kills import finished, same


@pytest.mark.parametrize("case", CASES)
def test_remote_ranks_and_one_process_give_the_same_bits(
    case: str, stage: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage(case)
    finished(*(actor.start() for actor in (run.server(), *run.clients())))
    same(run, undisturbed)
    if not CASES[case].algorithm().joint or "secure_aggregation" in CASES[case].settings:
        return  # its clients take turns, which ranks do not, or ranks are refused
    finished(*(actor.start() for actor in run.ranks()))
    monkeypatch.setattr(type(run), "run", Path(run.folder) / "version_0")
    same(run, undisturbed)
