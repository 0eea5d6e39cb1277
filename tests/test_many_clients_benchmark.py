"""The benchmark of many clients: its fit, its page and picture, and that what it measures can be measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.many_clients import GROUP, RATIOS, Beside, Clock, Tokens, lora, orchestrator
from benchmarks.many_clients_page import page, picture, slope
from hosfl_lightning import SplitCausalLM
from tests.recipe_runs import ROOT

RESULTS = ROOT / "docs" / "results"


def test_the_fit_is_of_all_points_but_the_first() -> None:
    rows: list[dict[str, float]] = [{"x": x, "y": 3.0 * x**2} for x in (1, 10, 100, 1000)]
    rows[0]["y"] = 1e6
    assert abs(slope(rows, "x", "y") - 2) < 1e-9


def test_the_page_and_the_picture_are_of_the_figures(tmp_path: Path) -> None:
    found = json.loads((RESULTS / "many_clients.json").read_text())
    assert page(found) == (RESULTS / "many_clients.md").read_text()
    assert found["ratios"].keys() == RATIOS.keys()
    picture(found).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_round_is_measured_beside_the_same_by_hand(tmp_path: Path, tiny_folder: Path) -> None:
    beside, clock, asked = Beside(), Clock(), GROUP // 10
    runner = orchestrator(asked, 3, str(tmp_path), 4, beside)
    runner.callbacks.append(clock)
    runner.fit(SplitCausalLM(str(tiny_folder), cut=2, lora=lora()), Tokens(2 * asked, 6))
    assert len(beside.ratios) == 2 and all(0.2 < ratio < 20 for ratio in beside.ratios)
    row = clock.row()
    assert row["registration_seconds"] > 0 and row["round_seconds"] > 0 and row["round_bytes"] >= 0
