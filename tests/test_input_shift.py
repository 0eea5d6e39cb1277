"""The table of shifted inputs: its cells, grids, rows and start, from results that were made up."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import input_shift, input_shift_pretraining
from benchmarks.cells import FIRST_ORDER, FROZEN
from benchmarks.client_learning_overview import overview
from benchmarks.input_shift import QUICK, arguments, comparison, entries, main, shown, write
from benchmarks.input_shift_cells import CELLS, EIGHT, PERSONAL, SIDE, TASKS, Cell, methods
from hosfl_lightning.compare.command import untuned
from hosfl_lightning.models.weights import load_weights
from hosfl_lightning.networks import ConvNet
from tests.test_client_learning import results

SHIPPED = Path(__file__).parent.parent / "docs" / "results" / "input_shift"
PLACES = {"data": "/d", "weights": "/w"}
CELL = CELLS[0]


def found() -> dict[str, Any]:
    """Of an image cell."""
    made = results(**{EIGHT: [2.6, 2.8]})
    made["methods"].pop("side adapter")
    for one in made["methods"].values():
        one["accuracy"] = one["perplexity"]
    return made | {"metric": "accuracy"}


class TestCells:
    @pytest.mark.parametrize("cell", [*CELLS, *QUICK], ids=lambda cell: cell.name)
    def test_the_settings_of_a_cell_are_those_of_a_comparison(self, cell: Cell, tmp_path: Path) -> None:
        settings = comparison(cell, PLACES, tmp_path, personal=True)
        settings.check()
        assert settings.grid_size == 3 and untuned(settings) == []
        assert {FROZEN, FIRST_ORDER} <= {*settings.methods} <= {name for name, _ in methods(cell.settings)}
        assert ({*PERSONAL} <= {*settings.methods}) == cell.each_client

    def test_personal_rows_are_there_when_they_are_asked_for(self, tmp_path: Path) -> None:
        cell = next(cell for cell in CELLS if cell.each_client)
        assert not {*PERSONAL} & {*comparison(cell, PLACES, tmp_path).methods}
        rows = comparison(cell, PLACES, tmp_path, personal=True).methods
        algorithms = [rows[name].algorithm or {} for name in PERSONAL]
        assert all(one["init_args"]["personal"] for one in algorithms)
        assert [one["class_path"].rpartition(".")[2] for one in algorithms] == ["HOSFL", "SplitFedSGD"]

    def test_no_row_has_a_rate_of_the_server_that_the_frozen_one_has_not(self) -> None:
        for cell in CELLS:
            server = cell.settings.server
            for name, one in methods(cell.settings):
                rates = [point["server_lr"] for point in one["grid"]]
                all_three = name == FROZEN or cell.settings.paired
                assert rates == ([*server] if all_three else 3 * [server[1]])

    def test_names_are_folders_of_their_own(self) -> None:
        assert len({cell.name for cell in CELLS}) == len({cell.title for cell in CELLS}) == len(CELLS)

    def test_the_narrow_side_adapter_fits_into_four_kib(self) -> None:
        """In ternary, a value is 1.6 bits and a row of 64 has a scale: below 2 bits a value."""
        image, text = TASKS["grey"], TASKS["text"]
        values = image.narrow * (16 * image.kernel**2 + 32), 3 * 2 * 64 * text.narrow
        assert all(2 / 8 * count <= 4096 for count in values)


class TestTable:
    def test_a_row_says_what_the_cell_is_and_what_the_client_trains(self) -> None:
        rows = {row["method"]: row for row in entries(CELL, found())}
        assert {row["title"] for row in rows.values()} == {CELL.title}
        assert (rows[EIGHT]["adapter"], rows[FIRST_ORDER]["adapter"]) == ("norm", "all weights")
        assert (rows[EIGHT]["scalars_up"], rows[EIGHT]["gap_closed"]) == (8, pytest.approx(0.35 / 0.55))

    def test_cells_are_written_with_tables_and_picture_and_no_path(self, tmp_path: Path) -> None:
        write([(CELL, found())], tmp_path, "command")
        written = json.loads((tmp_path / "input_shift.json").read_text())
        assert written["cells_left_out"] == [cell.name for cell in CELLS[1:]]
        assert f"| {CELL.title} |" in (tmp_path / "table.md").read_text()
        assert (tmp_path / "gap_closed.png").is_file()

    def test_the_shipped_tables_are_those_of_the_shipped_figures(self) -> None:
        rows = json.loads((SHIPPED / "input_shift.json").read_text())["rows"]
        assert overview(rows, [name for name, _ in methods(TASKS["grey"])]) in (SHIPPED / "table.md").read_text()


class TestCommand:
    def test_bad_calls_are_refused_before_the_first_cell(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]
        for args, message in (
            ([], "give --data and --out"),
            ([*given, "--cells", "nonsense"], "--cells: nonsense is not one of inverted"),
            (given, "--data: inverted needs"),
        ):
            with pytest.raises(SystemExit):
                arguments(args)
            assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_the_command_is_written_without_the_machines_paths(self) -> None:
        own = arguments(["--list", "--data=/home/me", "--out=/home/me/o", "--personal", "--cells", CELLS[1].name])
        base = "python -m benchmarks.input_shift --data DATA --out OUT"
        assert shown(own) == f"{base} --personal --cells {CELLS[1].name}"

    def test_pretraining_comes_once_and_cells_of_earlier_calls_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained = list[int]()

        def pretrain(folder: str, channels: int, out: Path) -> float:
            trained.append(channels)
            out.write_bytes(b"")
            return 0.9

        def compare(settings: Any, command: str) -> None:
            folder = Path(settings.out)
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(found()))

        monkeypatch.setattr(input_shift, "pretrain", pretrain)
        monkeypatch.setattr(input_shift, "compare", compare)
        monkeypatch.setattr(input_shift, "absent", lambda cells, data: "")
        monkeypatch.setattr(input_shift, "draw", lambda *_: None)
        names = ["inverted", "noise", "colour"]
        for name in names:
            main([f"--data={tmp_path}", f"--out={tmp_path}", "--cells", name])
        assert trained == [1, 3]
        written = json.loads((tmp_path / "input_shift.json").read_text())
        assert {row["cell"] for row in written["rows"]} == {*names}


def test_pretraining_keeps_off_what_clients_and_validation_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(60) % 10
    images = (labels.view(-1, 1, 1) * 25).expand(60, 28, 28).to(torch.uint8)
    for name, sizes, content in (("images-idx3", (60, 28, 28), images), ("labels-idx1", (60,), labels)):
        for split in ("train", "t10k"):
            head = struct.pack(f">4B{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)
            (tmp_path / f"{split}-{name}-ubyte").write_bytes(head + bytes(content.flatten().tolist()))
    seen = list[int]()
    collate = input_shift_pretraining.FashionMNISTData.collate

    def spy(data: Any, examples: Any) -> Any:
        seen.append(len(examples))
        return collate(data, examples)

    monkeypatch.setattr(input_shift_pretraining.FashionMNISTData, "collate", spy)
    monkeypatch.setattr(input_shift_pretraining, "DEALT", 20)
    before = torch.get_rng_state()
    out = tmp_path / "w.safetensors"
    input_shift_pretraining.pretrain(str(tmp_path), 1, out, epochs=1, batch_size=8)
    assert seen == [60 - 6 - 20, 6]  # a tenth is held out, 20 are the clients'
    assert torch.equal(before, torch.get_rng_state())
    load_weights(ConvNet(1, (16, 32, 64), 10, 28), str(out))


def test_every_row_of_the_shipped_table_was_run_under_the_seeds_that_it_names() -> None:
    for row in json.loads((SHIPPED / "input_shift.json").read_text())["rows"]:
        assert row["failed"] or len(row["seeds"]) >= 3, row["cell"]
        assert row["split"] == "test" and (row["method"] != SIDE or row["codec"] == "ternary")
