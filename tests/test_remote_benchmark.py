"""The benchmark of clients on other machines, as small as it can be: all systems run, and the page has every table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.remote_page import SECTIONS, page
from tests.recipe_runs import ROOT, SOURCES

#: Those of a few seconds; the others run a recipe.
PARTS = ["steps", "memory", "kills"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In a process of its own: it forks, which a process that uses gRPC must not.
    out = tmp_path_factory.mktemp("remote")
    command = [sys.executable, "-m", "benchmarks.remote", f"--out={out}", "--quick", "--parts", *PARTS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": SOURCES}, check=True, timeout=240)
    return out


@pytest.fixture(scope="module")
def found(written: Path) -> dict[str, Any]:
    return json.loads((written / "remote.json").read_text())


def test_all_systems_move_messages_of_the_same_sizes(found: dict[str, Any]) -> None:
    rows = found["steps"]["found"]
    assert [(row["link"], row["clients"]) for row in rows] == [("plain", 1), ("plain", 2), ("mTLS", 1), ("mTLS", 2)]
    for row in rows:
        assert row["median"].keys() == {"ours", "gRPC", "gRPC, SHA-256"}
        assert all(0 < row["minimum"][name] <= row["median"][name] for name in row["median"])
        assert row["sizes"].keys() == {
            "step_request", "smashed_data", "multiplier", "projected_gradients", "update"
        }  # fmt: skip


def test_idle_clients_and_kills_are_measured(found: dict[str, Any]) -> None:
    assert [row["link"] for row in found["memory"]["found"]] == ["plain", "mTLS"]
    kills = found["kills"]["found"]
    assert [len(row["seconds"]) for row in (*kills["server"], kills["client"])] == [1, 1]
    assert all(row["seconds"][0] > 0 for row in (*kills["server"], kills["client"]))


def test_the_page_has_a_table_and_a_verdict_for_each_part(written: Path, found: dict[str, Any]) -> None:
    assert (written / "remote.md").read_text() == page(found)
    times = {"one_process": 1.0, "remote": 1.2}
    of_rounds = [{"place": "two cores", "rounds": 6, "median": times, "minimum": times}]
    of_wire = [{"link": "plain", "rounds": 2, "ledger": 1000.0, "sockets": {"up": 600, "down": 500}}]
    for part, measured in (("rounds", of_rounds), ("wire", of_wire)):
        found = found | {part: found["steps"] | {"found": measured}}
    text = page(found)
    assert all(f"## {title}" in text for title, _ in SECTIONS.values())
    assert "| two cores | 6 | 1.200 s | 1.000 s | 1.20 | 1.20 | met |" in text
    assert "| plain | 2 | 600 | 500 | 1,000 | 1.1000 | missed |" in text


def test_the_shipped_page_is_that_of_the_shipped_figures() -> None:
    results = Path(__file__).parent.parent / "docs" / "results"
    assert (results / "remote.md").read_text() == page(json.loads((results / "remote.json").read_text()))
