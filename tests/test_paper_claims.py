from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.paper_claims import CELLS, FROZEN, PUBLISHED_RATE, RECIPES, arguments, comparison, methods, write


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_cell_is_a_comparison_at_equal_conditions(cell, tmp_path: Path):
    settings = comparison(cell, tmp_path, "MODEL", tmp_path)
    settings.check()  # equal grids, no setting of one method that all must share
    assert FROZEN in settings.methods
    assert settings.methods[settings.first_order].algorithm["class_path"].endswith("SplitFedSGD")
    assert (settings.jobs, settings.grid_size) == (1, 1 if cell.server_rate == PUBLISHED_RATE else cell.points)
    assert settings.overrides["data.init_args.test"].endswith("mr_polarity/test.jsonl.gz")


def test_cells_differ_in_their_folders():
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert {cell.model for cell in CELLS} == RECIPES.keys()


def test_the_published_rates_are_those_of_all_rows():
    (cell,) = [cell for cell in CELLS if cell.server_rate == PUBLISHED_RATE]
    assert {rate for one in methods(cell).values() for point in one["grid"] for rate in point.values()} == {1e-5}


def test_the_table_says_what_did_not_run(tmp_path: Path):
    write(tmp_path, "COMMAND")
    text = (tmp_path / "table.md").read_text()
    assert "COMMAND" in text and all(cell.name in text for cell in CELLS)
    assert json.loads((tmp_path / "claims.json").read_text())["cells_left_out"] == [cell.name for cell in CELLS]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["--cells", "none"], "none is not one of gemma_cut12"),
        (["--data", "."], "give --out"),
        (["--data", "{data}", "--out", "{data}"], "--gemma: gemma_cut12"),
        (["--data", "{data}", "--out", "{data}", "--gemma", "nowhere"], "nowhere is not there"),
    ],
)
def test_what_cannot_run_is_refused_first(given, word, tmp_path: Path, capsys):
    (tmp_path / "mr_polarity").mkdir()
    with pytest.raises(SystemExit):
        arguments([one.format(data=tmp_path) for one in given])
    assert word in capsys.readouterr().err
