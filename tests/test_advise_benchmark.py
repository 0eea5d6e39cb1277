"""The advisor's benchmark: what is compared with what, from figures that were made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.advise import common_server, joined, of_cell, point, tried
from benchmarks.advise_agreement import FREEZE, Cell, Row, bootstrap, kendall, most, over_cells, over_rows, report
from benchmarks.client_learning_cells import CELLS, TASKS, methods

ROWS = (Row(FREEZE, 0.0, (0.0, 0.0, 0.0)), Row("side", 0.3, (0.2, 0.3, 0.4)), Row("backprop", 0.2, (0.5, 0.4, 0.3)))
RIGHT, WRONG = Cell("right", ROWS, "backprop", 0.5), Cell("wrong", ROWS, FREEZE, 0.1)


def test_kendall_counts_pairs_and_ties_for_nothing() -> None:
    assert kendall([(1, 1), (2, 2), (3, 3)]) == (3, 3)
    assert kendall([(1, 3), (2, 2), (3, 2)]) == (-2, 3)


class TestAgreement:
    def test_over_rows_and_cells(self) -> None:
        assert over_rows([RIGHT]) == pytest.approx(1 / 3)
        low = Cell("low", (ROWS[0], Row("side", 0.1, (0.1, 0.1, 0.1))), "side", 0.2)
        assert over_cells([RIGHT, low], most) == 1.0

    def test_a_choice_within_the_best_rows_interval_is_right(self) -> None:
        assert RIGHT.best.name == "backprop"
        assert 0.3 <= RIGHT.least < 0.4
        assert RIGHT.right
        assert not WRONG.right

    def test_the_interval_holds_the_figure(self) -> None:
        """At seed 2 alone the side adapter is the better one, as predicted."""
        assert bootstrap([RIGHT, WRONG], over_rows) == pytest.approx((1 / 3, 1.0))

    def test_the_report_names_misses_and_keeps_tuned_cells_apart(self) -> None:
        text = report([RIGHT, WRONG], tuned=["right"])
        assert "right (tuned)" in text
        assert "Reported cells: 0 of 1" in text
        assert "tuned: 1 of 1" in text
        assert "Miss: wrong: freeze 0.000, best backprop 0.400" in text


class TestCells:
    def test_a_row_is_found_by_what_its_cell_is_or_by_its_name(self) -> None:
        cell = next(one for one in CELLS if one.name == "digits_cut3_strong_8clients_dirichlet_0.3")
        row = {
            "task": "digits", "cut": 3, "server": "strong", "clients": 8, "partition": "dirichlet", "alpha": 0.3,
        }  # fmt: skip
        assert [one.name for one in CELLS if of_cell(one, row)] == [cell.name]
        assert of_cell(SimpleNamespace(name="blur"), {"cell": "blur"})

    def test_rows_that_are_no_candidate_are_left_out(self) -> None:
        names = [name for name, one in methods(TASKS["digits"], strong=True) if tried(one)]
        left = {"first order, checkpointed", "side adapter, 1,024 coordinates", "side adapter, random signs"}
        assert {name for name, _ in methods(TASKS["digits"], strong=True)} - {*names} == left

    def test_rates_are_the_middle_of_a_grid_beside_one_server(self) -> None:
        grid = [{"client_lr": c, "server_lr": s} for s in (0.1, 0.2) for c in (3.0, 1.0, 2.0)]
        still = [{"server_lr": 0.2}, {"server_lr": 0.05}]
        tables = {"frozen": SimpleNamespace(grid=still), "side": SimpleNamespace(grid=grid)}
        comparison: Any = SimpleNamespace(methods=tables)
        assert common_server(comparison) == 0.2
        assert grid[point(grid, 0.2)] == {"client_lr": 2.0, "server_lr": 0.2}

    def test_what_was_advised_stands_beside_what_was_measured(self) -> None:
        rows = [
            {"cell": "blur", "method": name, "loss": {"values": {"0": loss, "1": loss + 1}}}
            for name, loss in (("frozen", 2.0), ("side", 1.5), ("not advised on", 1.0))
        ]
        found = {"name": "side", "gain": [0.4, 0.1, 0.6], "share": [0.3, 0.2, 0.4], "backprop": False}
        cell = joined(SimpleNamespace(name="blur"), {"choice": "side", "findings": [found]}, rows)
        assert [(row.name, row.predicted, row.measured) for row in cell.rows] == [
            (FREEZE, 0.0, (0.0, 0.0)), ("side", 0.4, (0.5, 0.5)),
        ]  # fmt: skip
        assert cell.chosen.name == "side"
