from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.when_it_pays import PANELS, closed, losses, moments, table

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def test_the_shipped_table_is_of_what_was_measured():
    assert (RESULTS / "when_it_pays.md").read_text() == table([(one, losses(RESULTS, one)) for one in PANELS])
    assert (RESULTS / "when_it_pays.png").is_file()


def test_a_bar_is_a_mean_and_its_standard_error():
    assert moments({0: 1.0, 1: 3.0}) == (2.0, 1.0)


def test_no_gap_is_no_share():
    level = {0: 1.0, 1: 1.1}
    assert closed({"frozen": level, "forward-only": level, "first order": level}) == "no gap to close"
    assert closed({"frozen": level, "forward-only": {0: 0.75, 1: 0.85}, "first order": {0: 0.5, 1: 0.6}}) == (
        "gap closed 50% [50%, 50%]"
    )


def test_what_was_not_measured_is_named(tmp_path: Path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "claims.json").write_text(json.dumps({"cells": {}}))
    with pytest.raises(SystemExit, match=r"gemma_cut12.*has no row 'frozen'; run python -m benchmarks.paper_claims"):
        losses(tmp_path, next(one for one in PANELS if one.file == "claims"))
