"""The page of the client without torch is what its figures say."""

from __future__ import annotations

import json

from benchmarks.device_page import page
from tests.recipe_runs import ROOT

RESULTS = ROOT / "docs/results"


def test_the_page_is_of_the_figures() -> None:
    found = json.loads((RESULTS / "device/figures.json").read_text())
    assert {*found} == {"install", "start", "memory", "rounds", "peaks"}
    assert (RESULTS / "device.md").read_text() == page(found)
