"""The table of the client's learning: its cells, grids, rows and pictures, from results that were made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks import client_learning
from benchmarks.cells import FIRST_ORDER, FROZEN
from benchmarks.client_learning import arguments, entries, main, shown, write
from benchmarks.client_learning_cells import CELLS, QUICK, TASKS, Cell, methods
from benchmarks.client_learning_overview import DIVERGED, NO_GAP, overview
from benchmarks.client_learning_pictures import by_cell, over
from hosfl_lightning.compare.command import untuned
from hosfl_lightning.compare.results import reckon
from hosfl_lightning.compare.runs import Group, Run
from hosfl_lightning.compare.statistics import gap_closed, spread
from hosfl_lightning.compare.table import cost_columns

CELL = CELLS[0]
NAMES = [name for name, _ in methods(TASKS["shakespeare"], strong=True)]
LOSSES = {FROZEN: [3.0, 3.1], FIRST_ORDER: [2.5, 2.5], "side adapter": [2.6, 2.8]}
COSTS = {
    "rounds": 150, "d_client": 5000, "bytes_up_per_client_round": 900.0, "bytes_down_per_client_round": 800.0,
    "client_peak_bytes": 7, "client_inference_bytes": 6, "client_forwards_per_round": 2.0,
}  # fmt: skip


def row(losses: list[float | None], controls: tuple[dict[int, float], dict[int, float]]) -> dict[str, Any]:
    """As `reckon` makes it; a seed whose loss is None has failed."""
    own = {seed: loss for seed, loss in enumerate(losses) if loss is not None}
    found, reason = gap_closed(own, *controls)
    values = {**spread(own.values()), "values": {str(seed): loss for seed, loss in own.items()}}
    point = {"client_lr": 0.01, "server_lr": 0.0025} if own else None
    return {
        "seeds": [*own], "failed": {str(s): "its loss is nan" for s, loss in enumerate(losses) if loss is None},
        "loss": values, "perplexity": values, "gap_closed": {**found, "split": "test"} if found else None,
        "no_gap_closed": reason, "below_frozen": None, "client_put_back": None, "rounds_to_target": None,
        "point": point, "edge": True,
        "trials": [{"point": {"client_lr": c, "server_lr": s}} for s in (0.0025, 0.005) for c in (0.004, 0.01, 0.025)],
        **(COSTS if own else {}),
    }  # fmt: skip


def results(**losses: list[float | None]) -> dict[str, Any]:
    all_losses: dict[str, list[float | None]] = {**LOSSES, **losses}  # type: ignore[dict-item]
    controls = [
        {seed: loss for seed, loss in enumerate(all_losses[name]) if loss is not None} for name in (FROZEN, FIRST_ORDER)
    ]
    rows = {name: row(one, (controls[0], controls[1])) for name, one in all_losses.items()}
    made = {"date": "today", "command": "c", "machine": "m", "versions": {"torch": "2"}}
    return {"evaluated_on": "test", "metric": "perplexity", "mode": "min", "target": None, "no_target": "",
            "methods": rows, "made": made}  # fmt: skip


def table(found: dict[str, Any], cell: Cell = CELL) -> dict[str, dict[str, Any]]:
    return {entry["method"]: entry for entry in entries(cell, found)}


def cells_in(folder: Path, **found: dict[str, Any]) -> None:
    """As earlier calls left them."""
    for name, one in found.items():
        (folder / "cells" / name).mkdir(parents=True)
        (folder / "cells" / name / "results.json").write_text(json.dumps(one))


def run(folder: Path, algorithm: str) -> Run:
    """One that is finished."""
    folder.mkdir()
    summary = {"algorithm": algorithm, "d_client": 5000, "rounds": 1, "client_peak_bytes": 7, "client_forward_bytes": 6,
               "metrics_last": {"val/loss": 1.0}, "versions": {"torch": "2"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text("round,val/loss\n1,1.0\n")
    (folder / "config.yaml").write_text("{}")
    return Run(folder)


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        arguments(args)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


class TestRows:
    def test_a_row_or_a_seed_that_diverged_is_a_row_still(self, tmp_path: Path) -> None:
        found = results(**{FROZEN: [3.0, 3.1, None], FIRST_ORDER: [2.5, 2.5, 2.5], "side adapter": [None, 2.8, 2.7],
                           "side adapter, int4": [None, None, None]})  # fmt: skip
        rows = table(found)
        assert rows["side adapter, int4"]["failed"] == dict.fromkeys("012", "its loss is nan")
        assert (rows["side adapter, int4"]["d_client"], rows["side adapter, int4"]["gap_closed"]) == (None, None)
        assert rows[FROZEN]["failed"] == {"2": "its loss is nan"}
        assert [*rows[FIRST_ORDER]["gap_closed_each_seed"]] == ["0", "1"]
        write([(CELL, found)], tmp_path, "command")
        assert "**Failed** under seed 0" in (tmp_path / "table.md").read_text()

    def test_a_frozen_client_trains_and_sends_nothing(self, tmp_path: Path) -> None:
        frozen = table(results())[FROZEN]
        assert (frozen["scalars_up"], frozen["aggregation"], frozen["codec"]) == (0, None, None)
        groups = [Group(name, {0: run(tmp_path / name, name)}) for name in ("Frozen", "HOSFL")]
        reckoned = reckon(groups, None, "min", None, "")
        trains = cost_columns(reckoned)["client trains"]
        assert [trains(one) for one in reckoned["methods"].values()] == ["0", "5,000"]

    def test_what_travels_is_the_methods(self) -> None:
        names = [name for name, _ in methods(TASKS["shakespeare"], strong=True)]
        rows = table(results(**{name: [2.6, 2.8] for name in names if name not in LOSSES}))
        sent = {name: (one["aggregation"], one["codec"], one["scalars_up"]) for name, one in rows.items()}
        assert sent == {
            FROZEN: (None, None, 0), FIRST_ORDER: ("dense", "fp32", 5000),
            "first order, checkpointed": ("dense", "fp32", 5000), "first order, side adapter": ("dense", "fp32", 5000),
            "HO-SFL as published": ("shared_directions", "fp32", 2),
            "HO-SFL, 8 probes": ("shared_directions", "fp32", 8),
            "side adapter, 8 probes": ("shared_directions", "fp32", 8),
            "side adapter": ("dense", "fp32", 5000), "side adapter, int4": ("dense", "int4", 5000),
            "side adapter, 4 KB": ("dense", "ternary", 5000),
            "side adapter, 1,024 coordinates": ("coordinates", "fp32", 1024),
            "side adapter, random signs": ("dense", "fp32", 5000),
        }  # fmt: skip
        assert {name for name, one in rows.items() if one["client_backprop"]} == {*names[1:4]}

    def test_the_seeds_shares_are_given_where_there_is_a_gap(self) -> None:
        side = table(results())["side adapter"]
        assert side["gap_closed_each_seed"] == pytest.approx({"0": 0.8, "1": 0.5})
        assert side["gap_closed_std"] == pytest.approx(0.3 / 2**0.5)
        none = table(results(**{FIRST_ORDER: [2.9, 3.2]}))["side adapter"]
        assert (none["gap_closed"], none["gap_closed_each_seed"], none["gap_closed_std"]) == (None, {}, None)
        assert none["no_gap_closed"].startswith("no gap here")

    def test_a_row_says_on_what_and_how_it_was_found(self) -> None:
        side = table(results())["side adapter"]
        assert (side["split"], side["rounds"], side["partition"], side["alpha"]) == ("test", 150, "iid", None)
        assert side["edge"] == ["server_lr"]  # 0.01 lies between the client's other two
        skewed = next(cell for cell in CELLS if cell.task == "banking77" and "dirichlet" in cell.name)
        found = results()
        for one in found["methods"].values():
            one["accuracy"] = one["perplexity"]
        assert {(one["partition"], one["alpha"]) for one in table(found, skewed).values()} == {("dirichlet", 0.3)}


class TestGrids:
    @pytest.mark.parametrize("name", TASKS)
    def test_every_row_has_four_points_and_frozen_the_servers_rates_of_all(self, name: str) -> None:
        rows = dict(methods(TASKS[name], strong=True))
        for method, one in rows.items():
            points = {tuple(point.values()) for point in one["grid"]}
            assert len(points) == len(one["grid"]) == 4
            assert method == FROZEN or len({point["client_lr"] for point in one["grid"]}) == 2
        assert {*TASKS[name].server} < {point["server_lr"] for point in rows[FROZEN]["grid"]}

    @pytest.mark.parametrize(
        "cell", [*{cell.task: cell for cell in CELLS}.values(), QUICK[0]], ids=lambda cell: cell.name
    )
    def test_the_settings_of_a_cell_are_those_of_a_comparison(self, cell: Cell, tmp_path: Path) -> None:
        settings = client_learning.comparison(cell, {"data": "/d", "minilm": "/m"}, tmp_path)
        settings.check()
        assert settings.grid_size == cell.points
        assert cell.points == 1 or untuned(settings) == []

    def test_a_cell_chooses_from_the_methods(self) -> None:
        known = {name for name, _ in methods(TASKS["shakespeare"], strong=True)}
        assert all({FROZEN, FIRST_ORDER} <= {*cell.rows} <= known for cell in [*CELLS, *QUICK] if cell.rows)


class TestCommand:
    def test_names_are_folders_of_their_own(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["--list"])
        names = capsys.readouterr().out.split()
        assert names == [cell.name for cell in CELLS]
        assert len({*names}) == len(names)

    def test_quick_cells_can_be_named(self) -> None:
        assert arguments(["--list", "--quick", "--cells", QUICK[1].name]).cells == [QUICK[1]]

    def test_bad_calls_are_refused_before_the_first_cell(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = (f"--data={tmp_path}", f"--out={tmp_path / 'out'}")
        line = refusal(capsys, *given, "--cells", "digits")
        assert "--cells: digits is not one of" in line and all(cell.name in line for cell in CELLS)
        line = refusal(capsys, *given, "--quick", "--cells", CELLS[2].name)
        assert line.endswith(f"{CELLS[2].name} is not one of {', '.join(cell.name for cell in QUICK)}")
        assert "give --data and --out" in refusal(capsys)
        assert "--data: shakespeare_cut3_strong_8clients needs {data}/stories260k" in refusal(capsys, *given)
        assert "--minilm: snips_cut4" in refusal(capsys, *given, "--cells", "snips_cut4_strong_8clients_iid")
        assert not (tmp_path / "out").exists()

    def test_the_command_is_written_without_the_machines_paths(self) -> None:
        base = "python -m benchmarks.client_learning --data DATA"
        own = arguments(["--list", "--data=/home/me/d", "--minilm=/home/me/m", "--out=/home/me/o"])
        assert shown(own) == f"{base} --minilm MODEL --out OUT"
        own = arguments(["--list", "--data=/home/me/d", "--out=/home/me/o", "--quick", "--cells", QUICK[0].name])
        assert shown(own) == f"{base} --out OUT --quick --cells {QUICK[0].name}"

    def test_cells_of_earlier_calls_stay_in_the_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def compare(settings: Any, command: str) -> None:
            cells_in(tmp_path, **{Path(settings.out).name: results()})

        monkeypatch.setattr(client_learning, "compare", compare)
        monkeypatch.setattr(client_learning, "absent", lambda cells, places: "")
        other = next(cell for cell in CELLS if (cell.task, cell.cut) == ("shakespeare", 2))
        cells_in(tmp_path, **{other.name: results()})
        main(["--data=/home/me/d", f"--out={tmp_path}", "--cells", CELLS[0].name])
        written = json.loads((tmp_path / "client_learning.json").read_text())
        assert {(one["cut"], one["method"]) for one in written["rows"]} == {(c, m) for c in (3, 2) for m in LOSSES}
        assert written["cells_left_out"] == [cell.name for cell in CELLS[1:] if cell != other]
        text = (tmp_path / "table.md").read_text()
        assert f"## {CELLS[0].name}" in text and f"## {other.name}" in text
        assert "/home/me" not in text + json.dumps(written)


class TestOverview:
    def test_a_line_a_cell_and_a_share_a_method(self) -> None:
        failed = {"side adapter, int4": [None, None]}
        gap, none = results(**failed), results(**{FIRST_ORDER: [2.9, 3.2]})
        other = next(cell for cell in CELLS if cell.clients == 1)
        for one in none["methods"].values():
            one["accuracy"] = one["perplexity"]
        words, _, head, _, first, second = overview([*entries(CELL, gap), *entries(other, none)], NAMES).splitlines()
        assert words.startswith("Both controls' test loss, then the gap closed")
        assert head == f"| task | {FROZEN} | {FIRST_ORDER} | side adapter | side adapter, int4 |"
        controls = "3.0500 ± 0.0707 | 2.5000 ± 0.0000"
        named = "shakespeare, cut 3, strong server, 8 clients"
        assert first == f"| {named} | {controls} | 64% [51%, 79%] | {DIVERGED} |"
        assert second.startswith("| digits, cut 3, strong server, 1 client |")
        assert second.endswith(f"| {NO_GAP} | – |")

    def test_of_many_methods_the_rarer_ones_are_in_a_table_of_their_own(self) -> None:
        every = [name for name, _ in methods(TASKS["shakespeare"], strong=True)]
        many = results(**{name: [2.6, 2.8] for name in every if name not in LOSSES})
        few = next(cell for cell in CELLS if (cell.task, cell.cut) == ("shakespeare", 2))
        tables = overview([*entries(few, results()), *entries(CELL, many)], NAMES).split("\n\n")[1:]
        heads = [[name.strip() for name in table.splitlines()[0].split("|")[1:-1]] for table in tables]
        assert [len(head) for head in heads] == [7, 7]
        assert {name for head in heads for name in head} == {"task", *every}
        assert heads[0][:4] == ["task", FROZEN, FIRST_ORDER, "side adapter"]
        assert [len(table.splitlines()) - 2 for table in tables] == [2, 1]

    def test_the_shipped_tables_are_those_of_the_shipped_figures(self) -> None:
        shipped = Path(__file__).parent.parent / "docs" / "results" / "client_learning"
        rows = json.loads((shipped / "client_learning.json").read_text())["rows"]
        assert overview(rows, NAMES) in (shipped / "table.md").read_text()


class TestPictures:
    STYLES = {name: {"color": "#332288", "marker": "o"} for name in (FROZEN, FIRST_ORDER, "side adapter")}

    def test_a_row_far_away_is_an_arrow_and_its_number(self) -> None:
        rows = [*table(results(**{"side adapter": [9.0, 9.1]})).values()]
        far = f"{100 * rows[-1]['gap_closed']:.0f} %"
        for figure in (by_cell(rows, self.STYLES), over(rows, self.STYLES, "bytes_up", "bytes")):
            axes = figure.axes[0]
            assert [text.get_text() for text in axes.texts] == [far]
            assert {"<", "v"} & {line.get_marker() for line in axes.lines}
            assert far not in figure.get_supxlabel()

    @pytest.mark.parametrize(
        ("interval", "heads"), [([-1.0, 0.5], "<"), ([0.1, 3.0], ">"), ([-1.0, 3.0], "<>"), ([0.1, 2.0], "")]
    )
    def test_an_interval_that_leaves_the_axis_has_an_arrow_head_at_the_cut_end(
        self, interval: list[float], heads: str
    ) -> None:
        rows = [*table(results()).values()]
        rows[-1]["gap_closed_interval"] = interval
        axes = by_cell(rows, self.STYLES).axes[0]
        found = {line.get_marker(): [*line.get_xdata()] for line in axes.lines if line.get_marker() in ("<", ">")}
        ends = {"<": [axes.get_xlim()[0]], ">": [axes.get_xlim()[1]]}
        assert found == {head: ends[head] for head in heads}

    def test_numbers_of_rows_far_away_do_not_hide_each_other(self) -> None:
        rows = [*table(results(**{"side adapter": [9.0, 9.1]})).values()] + [
            one for one in table(results(**{"side adapter": [8.0, 8.1]})).values() if one["method"] == "side adapter"
        ]
        (axes,) = over(rows, self.STYLES, "bytes_up", "bytes").axes
        assert len({text.xyann for text in axes.texts}) == len(axes.texts) == 2

    def test_cells_without_a_gap_and_rows_that_failed_are_left_out_and_named_below(self) -> None:
        failed = "side adapter, int4"
        other = next(cell for cell in CELLS if (cell.task, cell.cut) == ("shakespeare", 2))
        rows = [*table(results(**{FIRST_ORDER: [2.9, 3.2]}), other).values()]
        rows += table(results(**{failed: [None, None]})).values()
        styles = self.STYLES | {failed: {"color": "#332288", "marker": "o"}}
        figures = by_cell(rows, styles), over(rows, styles, "bytes_up", "bytes")
        there, gone = "shakespeare, cut 3, strong server, 8 clients", "shakespeare, cut 2, strong server, 8 clients"
        for figure in figures:
            words = figure.get_supxlabel().replace("\n", " ")
            assert f"as the controls have no gap between them: {gone!r}." in words
            assert f"as no share is known of them: '{failed} in {there}'." in words
        assert [axes.get_title(loc="left") for axes in figures[0].axes if axes.axison] == [there]
        assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["side adapter"]

    def test_no_panel_has_more_than_eight_lines(self) -> None:
        every = [name for name, _ in methods(TASKS["shakespeare"], strong=True)]
        rows = [*table(results(**{name: [2.6, 2.8] for name in every if name not in LOSSES})).values()]
        styles = {name: {"color": "#332288", "marker": "o"} for name in every}
        cells, costs = by_cell(rows, styles), over(rows, styles, "bytes_up", "bytes")
        assert [len(axes.get_yticks()) for axes in cells.axes] == [5, 5]
        assert [axes.get_title(loc="left")[-8:] for axes in cells.axes] == ["(1 of 2)", "(2 of 2)"]
        names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in costs.axes]
        assert [len(one) for one in names] == [5, 5, 6]
        assert all({FROZEN, FIRST_ORDER} <= {*one} for one in names) and {*every} == {n for one in names for n in one}

    def test_a_dot_a_row_and_cell_over_its_cost(self) -> None:
        rows = [*table(results()).values(), *table(results(**{"side adapter": [2.9, 2.9]})).values()]
        (axes,) = over(rows, self.STYLES, "client_forward_equivalents", "forwards").axes
        dots = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if len(line.get_xdata())]
        assert sorted(dots) == sorted((2.0, 100 * one["gap_closed"]) for one in rows)
        assert axes.get_xscale() == "log" and not [*axes.texts]

    def test_three_pictures_are_written(self, tmp_path: Path) -> None:
        write([(CELL, results())], tmp_path, "command")
        names = {path.name for path in tmp_path.glob("*.png")}
        assert names == {
            "gap_closed.png", "gap_closed_over_bytes_up.png", "gap_closed_over_client_forward_equivalents.png"
        }  # fmt: skip
        assert all(matplotlib.image.imread(tmp_path / name).std() > 0 for name in names)
