"""The same tables from run folders that are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning.compare import report
from hosfl_lightning.compare.publish import publish
from hosfl_lightning.compare.results import reckon
from hosfl_lightning.compare.runs import Group
from hosfl_lightning.compare.settings import ComparisonError, Publish
from hosfl_lightning.compare.table import rows
from tests.compare.conftest import Compared, hosfl
from tests.test_wandb import Logged, offline, read_whole


def chosen(compared: Compared) -> list[Path]:
    return sorted(path.parent for path in compared.out.glob("runs/*/*/test.json"))


@pytest.fixture(scope="module")
def reported(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    out = tmp_path_factory.mktemp("report")
    hosfl("report", "--runs", *map(str, chosen(compared)), "--metric=perplexity", "--mode=min", f"--out={out}")
    return Compared(compared.config, out)


def test_the_numbers_are_those_of_the_comparison(compared: Compared, reported: Compared) -> None:
    algorithms = {"HO-SFL": "HOSFL", "frozen": "Frozen", "first order": "SplitFedSGD"}
    own = ("point", "edge", "trials", "failed_points")  # which only a comparison knows
    for name, algorithm in algorithms.items():
        expected = {key: value for key, value in compared.results["methods"][name].items() if key not in own}
        assert reported.results["methods"][algorithm] == expected
    assert reported.results["target"] == compared.results["target"]
    assert (reported.out / "memory.png").is_file()
    assert "Not equal conditions" not in reported.table


def test_rows_are_named_by_what_differs(compared: Compared) -> None:
    runs = sorted(path.parent for path in compared.out.glob("runs/HO-SFL/*/summary.json"))
    groups = report.group(map(str, runs))
    assert [sorted(group.runs) for group in groups] in ([[0, 1], [0]], [[0], [0, 1]])
    assert {group.name for group in groups} == {
        "HOSFL (client_optimizer.lr 0.003)", "HOSFL (client_optimizer.lr 0.01)"
    }  # fmt: skip


def test_a_run_with_random_signs_is_a_row_of_its_own(compared: Compared, tmp_path: Path) -> None:
    run = next(path for path in chosen(compared) if path.parent.name == "HO-SFL")
    control = Path(shutil.copytree(run, tmp_path / "control"))
    config = yaml.safe_load((control / "config.yaml").read_text())
    config["trainer"]["callbacks"].append({"class_path": "hosfl_lightning.callbacks.RandomSigns", "init_args": {}})
    (control / "config.yaml").write_text(yaml.safe_dump(config))
    groups = report.group([str(run), str(control)])
    assert [group.name for group in groups] == ["HOSFL", "HOSFL (callbacks RandomSigns)"]
    assert report.notes(groups) == []


def test_no_table_has_more_than_seven_columns(compared: Compared, reported: Compared) -> None:
    results = reported.results
    assert all(row["client_put_back"] for name, row in results["methods"].items() if name != "Frozen")
    for text in (compared.table, reported.table):
        tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
        widths = [[line.count("|") - 1 for line in table] for table in tables]
        assert [max(one) for one in widths] == [min(one) for one in widths] == [7, 7, 6]
    shown = [
        name.strip() for part in reported.table.split("\n\n")[:3] for name in part.splitlines()[0].split("|")[1:-1]
    ]
    head, _ = rows(results)
    assert [name for name in shown if name != "method"] == head[1:]


def test_without_test_results_the_validation_set_is_shown_and_said(compared: Compared, tmp_path: Path) -> None:
    run = Path(shutil.copytree(chosen(compared)[0], tmp_path / "run"))
    (run / "test.json").unlink()
    hosfl("report", f"--runs=[{run},{chosen(compared)[1]}]", f"--out={tmp_path}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["evaluated_on"] == "validation"
    summary = json.loads((run / "summary.json").read_text())
    (row,) = results["methods"].values()
    assert row["loss"]["values"]["0"] == summary["val_loss_last"]
    table = (tmp_path / "table.md").read_text()
    assert "**On the validation set**" in table
    assert "No gap closed (needs exactly one finished row of" in table


def test_a_loss_that_is_no_number_is_a_failure(compared: Compared, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(chosen(compared)[0], tmp_path / "run"))
    (bad / "test.json").write_text('{"test/loss": NaN, "test/perplexity": NaN}')
    hosfl("report", f"--runs=[{bad},{chosen(compared)[1]}]", f"--out={tmp_path}")
    (row,) = json.loads((tmp_path / "results.json").read_text())["methods"].values()
    assert (row["seeds"], [*row["failed"]]) == ([1], ["0"])


def test_of_two_frozen_rows_neither_is_the_control(compared: Compared, tmp_path: Path) -> None:
    runs = sorted(path.parent for path in compared.out.glob("runs/f*/*/summary.json"))
    hosfl("report", "--runs", *map(str, runs), f"--out={tmp_path}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["methods"]) == 4  # two points of each control
    assert results["target"] is None
    assert all(row["below_frozen"] is None for row in results["methods"].values())
    assert "needs exactly one finished row of Frozen and one of SplitFedSGD" in (tmp_path / "table.md").read_text()


def test_an_infinite_metric_is_null_and_drawn_over(compared: Compared, tmp_path: Path) -> None:
    run = Path(shutil.copytree(chosen(compared)[0], tmp_path / "run"))
    values = json.loads((run / "test.json").read_text())
    (run / "test.json").write_text(json.dumps({**values, "test/perplexity": float("inf")}))
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/perplexity")
    cells = rows[1].split(",")
    cells[column] = "inf"
    (run / "metrics.csv").write_text("\n".join([rows[0], ",".join(cells), *rows[2:]]))
    hosfl("report", f"--runs=[{run}]", "--metric=perplexity", f"--out={tmp_path}")
    (row,) = json.loads((tmp_path / "results.json").read_text())["methods"].values()
    assert row["perplexity"] == {"mean": None, "sd": None, "values": {"0": None}}
    assert row["curve"][0]["perplexity"]["mean"] is None
    assert (tmp_path / "rounds.png").is_file()


def test_of_two_first_order_rows_the_named_one_is_the_whole_gap(compared: Compared) -> None:
    groups = report.group(map(str, chosen(compared)))
    (row,) = (group for group in groups if group.algorithm == "SplitFedSGD")
    both = [*groups, Group("another", row.runs, row.failed, row.details)]
    one, two, named = (
        reckon(rows, None, "min", None, "", first_order)["methods"]["HOSFL"]
        for rows, first_order in ((groups, None), (both, None), (both, row.name))
    )
    assert two["gap_closed"] is None
    assert "exactly one" in two["no_gap_closed"]
    assert (named["gap_closed"], named["no_gap_closed"]) == (one["gap_closed"], one["no_gap_closed"])
    assert "exactly one" not in named["no_gap_closed"]


@pytest.mark.parametrize("what", ["data", "weights"])
def test_unequal_runs_are_told_of(compared: Compared, tmp_path: Path, what: str) -> None:
    copies = [Path(shutil.copytree(run, tmp_path / run.parent.name / run.name)) for run in chosen(compared)]
    if what == "data":
        config = yaml.safe_load((copies[0] / "config.yaml").read_text())
        config["data"]["init_args"]["batch_size"] = 5
        (copies[0] / "config.yaml").write_text(yaml.safe_dump(config))
    else:
        identity = json.loads((copies[0] / "run.json").read_text())
        identity["starts"]["server_half"]["weights"] = "other"
        (copies[0] / "run.json").write_text(json.dumps(identity))
    hosfl("report", "--runs", *map(str, copies), f"--out={tmp_path}")
    words = {
        "data": "the runs differ in data.init_args.batch_size",
        "weights": "differ in their initial weights of the server",
    }
    assert f"**Not equal conditions**: {words[what]}" in (tmp_path / "table.md").read_text().replace(
        "HOSFL and SplitFedSGD ", ""
    ).replace("HOSFL and Frozen ", "")


def budget(**limits: int) -> list[dict[str, Any]]:
    return [{"class_path": "hosfl_lightning.callbacks.Budget", "init_args": {"bytes": None, **limits}}]


PROBABILITY = {"class_path": "hosfl_lightning.availability.Probability", "init_args": {"p": 0.5}}
INT8 = {"smashed_data": "int8", "multiplier": "fp32", "gradient": "fp32"}
#: Settings and summary of the first run, of the second, and the note.
UNEQUAL: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"precision": "bf16-mixed"}, {}, {}, {}, "trainer.precision (bf16-mixed, 32-true)"),
    ({"gradient_clip_val": 1.0}, {}, {}, {}, "trainer.gradient_clip_val (1.0, None)"),
    ({"min_clients": 2}, {}, {}, {}, "trainer.min_clients (2, 1)"),
    ({"simulation": "per_client"}, {}, {}, {}, "trainer.simulation (per_client, batched)"),
    ({"num_nodes": 2}, {}, {}, {}, "trainer.simulation (per_client, batched)"),
    ({"availability": PROBABILITY}, {}, {}, {}, f"trainer.availability.class_path ({PROBABILITY['class_path']}, None), "
     "trainer.availability.init_args.p (0.5, None)"),
    ({}, {"clients_per_round": 3}, {}, {}, "trainer.clients_per_round (3, 2)"),
    ({}, {"codec": INT8}, {}, {}, "trainer.codec.smashed_data (int8, fp32)"),
    ({}, {"rounds": 3}, {}, {}, "rounds (3, 4)"),
    ({"callbacks": budget(samples=8)}, {"rounds": 3}, {"callbacks": budget(samples=9)}, {"rounds": 3},
     "Budget.samples (8, 9)"),
    ({"callbacks": budget(samples=9)}, {"rounds": 3}, {}, {}, "Budget.samples (9, None), rounds (None, 4)"),
    ({"callbacks": budget(samples=99)}, {"rounds": 3}, {"callbacks": budget(samples=99)}, {},
     "Budget.samples (99, None), rounds (None, 4)"),
]  # fmt: skip
#: The same, of runs that were equal all the same.
EQUAL: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"simulation": "batched", "clients_per_round": None}, {}, {}, {}),
    ({"callbacks": budget(samples=8)}, {"rounds": 3}, {"callbacks": budget(samples=8)}, {"rounds": 2}),
    ({"callbacks": budget(samples=8)[0]}, {"rounds": 3}, {"callbacks": budget(samples=8)}, {"rounds": 2}),
    ({"log_every_n_steps": 7, "callbacks": None}, {}, {}, {}),
]  # fmt: skip


def notes(compared: Compared, folder: Path, *changes: dict[str, Any]) -> list[str]:
    """Of two runs of different methods, after changes to the trainer's settings and the summary of each."""
    first, second = (next(run for run in chosen(compared) if run.parent.name == name) for name in ("HO-SFL", "frozen"))
    for number, run in enumerate((first, second)):
        copy = Path(shutil.copytree(run, folder / str(number)))
        config = yaml.safe_load((copy / "config.yaml").read_text())
        summary = json.loads((copy / "summary.json").read_text())
        config["trainer"] |= changes[2 * number]
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
        (copy / "summary.json").write_text(json.dumps({**summary, **changes[2 * number + 1]}))
    return report.notes(report.group([str(folder / "0"), str(folder / "1")]))


@pytest.mark.parametrize("case", UNEQUAL, ids=lambda case: case[-1])
def test_unequal_settings_are_named_with_their_values(compared: Compared, tmp_path: Path, case: Any) -> None:
    *changes, words = case
    assert notes(compared, tmp_path, *changes) == [f"**Not equal conditions**: the runs differ in {words}"]


@pytest.mark.parametrize("changes", EQUAL, ids=lambda case: " ".join(case[0]))
def test_what_makes_no_difference_is_not_told(compared: Compared, tmp_path: Path, changes: Any) -> None:
    assert notes(compared, tmp_path, *changes) == []


def test_a_run_from_before_there_were_nodes_is_of_one_process(compared: Compared, tmp_path: Path) -> None:
    first, second = chosen(compared)[:2]
    old = Path(shutil.copytree(first, tmp_path / "old"))
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["trainer"]["num_nodes"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    assert report.notes(report.group([str(old), str(second)])) == []


@pytest.mark.parametrize("split", ["test", "validation"])
def test_gap_closed_names_its_split(compared: Compared, tmp_path: Path, split: str) -> None:
    losses = {"HO-SFL": 2.5, "frozen": 3.0, "first order": 2.0}
    folders = [Path(shutil.copytree(run, tmp_path / run.parent.name / run.name)) for run in chosen(compared)]
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        loss = losses[folder.parent.name] + summary["seed"] / 10
        summary["metrics_last"]["val/loss"] = loss if split == "validation" else 1.0
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "test.json").write_text(json.dumps({"test/loss": loss if split == "test" else 1.0}))
    if split == "validation":
        (folders[0] / "test.json").unlink()
    gap = reckon(report.group(map(str, folders)), None, "min", None, "")["methods"]["HOSFL"]["gap_closed"]
    assert (gap["split"], gap["value"]) == (split, pytest.approx(0.5))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_null_is_a_loss_that_is_no_number(compared: Compared, tmp_path: Path, split: str) -> None:
    """As a run that diverged in its last round leaves it."""
    run, sound = (Path(shutil.copytree(one, tmp_path / str(i))) for i, one in enumerate(chosen(compared)[:2]))
    summary = json.loads((run / "summary.json").read_text())
    if split == "validation":
        summary["metrics_last"] = dict.fromkeys(summary["metrics_last"])
    else:
        (run / "test.json").write_text(json.dumps({"test/loss": None, "test/perplexity": None}))
    (run / "summary.json").write_text(json.dumps(summary))
    methods = reckon(report.group([str(run), str(sound)]), None, "min", None, "")["methods"]
    failed = [reason for row in methods.values() for reason in row["failed"].values()]
    assert failed == ["its loss is nan"]


def test_what_is_no_run_is_refused(compared: Compared, tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"is not the folder of a finished run: there is no summary\.json"):
        report.group([str(tmp_path)])
    with pytest.raises(ComparisonError, match="are the same method, settings and seed"):
        report.group([str(chosen(compared)[0])] * 2)


def test_an_unknown_metric_is_refused(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hosfl("report", f"--runs=[{chosen(compared)[0]}]", "--metric=f1", f"--out={compared.out / 'no'}")
    assert "has no 'f1' on the validation set; it has loss, " in capsys.readouterr().err


def test_wandb_gets_the_table_the_curves_and_the_pictures(reported: Compared, tmp_path: Path) -> None:
    results, pictures = reported.results, {"memory": reported.out / "memory.png"}
    with offline(tmp_path):
        publish(results, pictures, Publish("hosfl", "offline"), tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged = Logged(read_whole(file), tmp_path)
    for name, row in results["methods"].items():
        curve = {one["round"]: one[f"curve/{name}"] for one in logged.rows if f"curve/{name}" in one}
        assert curve == {point["round"]: pytest.approx(point["perplexity"]["mean"]) for point in row["curve"]}
    last: dict[str, Any] = logged.rows[-1]
    assert {"table", "memory"} <= {key.split(".")[0] for key in last}
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    head, body = rows(results)
    assert json.loads(table.read_text()) == {"columns": head, "data": body}
