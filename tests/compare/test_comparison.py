"""Whole comparisons: what they leave, killed ones, failed ones, unequal ones."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from hosfl_lightning import HOSFL, SplitCausalLM
from hosfl_lightning.algorithms import Algorithm, FedAvg
from hosfl_lightning.compare.command import parse
from hosfl_lightning.compare.conditions import unequal
from hosfl_lightning.compare.runner import Runner
from hosfl_lightning.compare.settings import Comparison, ComparisonError
from hosfl_lightning.compare.table import pm
from hosfl_lightning.compare.worker import Evaluate
from hosfl_lightning.run import checkpoint as checkpoints
from hosfl_lightning.run.identity import digest
from tests import recipe_runs
from tests.compare.conftest import Compared, hosfl
from tests.recipe_runs import ROOT

NAMES = ["HO-SFL", "frozen", "first order", "wild"]


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """Without times, the place and the command."""
    methods = {
        name: {key: value for key, value in row.items() if key != "client_seconds_per_round"}
        for name, row in results["methods"].items()
    }
    return {**results, "made": None, "methods": methods}


class TestDone:
    def test_every_point_at_one_seed_and_the_chosen_one_at_all(self, compared: Compared) -> None:
        for name in NAMES[:3]:
            row = compared.results["methods"][name]
            losses = [trial["val/loss"] for trial in row["trials"]]
            chosen = losses.index(min(losses))
            assert row["point"] == row["trials"][chosen]["point"]
            done = {path.name for path in (compared.out / "runs" / name).iterdir() if path.is_dir()}
            assert done == {"0-seed0", "1-seed0", f"{chosen}-seed1"}

    def test_the_test_set_is_touched_by_the_chosen_runs_alone(self, compared: Compared) -> None:
        tested = {path.parent for path in compared.out.glob("runs/*/*/test.json")}
        chosen = set()
        for name in NAMES[:3]:
            row = compared.results["methods"][name]
            number = [trial["point"] for trial in row["trials"]].index(row["point"])
            chosen |= {compared.run(name, f"{number}-seed{seed}") for seed in (0, 1)}
            for seed in (0, 1):
                values = load(compared.run(name, f"{number}-seed{seed}") / "test.json")
                assert row["loss"]["values"][str(seed)] == values["test/loss"]
                assert row["perplexity"]["values"][str(seed)] == values["test/perplexity"]
        assert tested == chosen
        assert not any("test/" in (path / "metrics.csv").read_text() for path in tested)

    def test_the_client_is_put_back_to_its_start_beside_a_server_as_trained(self, compared: Compared) -> None:
        methods = compared.results["methods"]
        assert methods["frozen"]["client_put_back"] is None
        for name in ("HO-SFL", "first order"):
            row = methods[name]
            number = [trial["point"] for trial in row["trials"]].index(row["point"])
            folder = compared.run(name, f"{number}-seed1")
            command = recipe_runs.hosfl("test", f"--config={folder}.yaml", "--trainer.logger=false")
            start = {key: bits.clone() for key, bits in command.model.trained_state().items()}
            assert digest(start) == load(folder / "run.json")["start"]
            ended = checkpoints.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
            server = {key: bits for key, bits in ended.items() if key.startswith("server_half.")}
            assert 0 < len(server) < len(ended) == len(start)
            command.model.load_trained_state(start | server)
            trainer: Any = command.trainer
            [metrics] = trainer.test(command.model, command.datamodule)
            assert row["client_put_back"]["values"]["1"] == metrics["test/loss"] != row["loss"]["values"]["1"]

    def test_the_table_says_what_it_is_to_be_put_back(self, compared: Compared) -> None:
        head, _, *body = (line.split(" | ") for line in compared.table.splitlines()[:6])
        column = head.index("test loss, client put back")
        shown = {line[0].removeprefix("| "): line[column] for line in body}
        for name in ("HO-SFL", "first order"):
            assert shown[name] == pm(compared.results["methods"][name]["client_put_back"])
        assert shown["frozen"] == shown["wild"] == "–"
        assert "relies on the client's change, not what the client contributed. For this column alone" in compared.table

    def test_methods_of_a_seed_begin_alike_and_seeds_do_not(self, compared: Compared) -> None:
        begins: dict[str, set[tuple[str, str]]] = {"seed0": set(), "seed1": set()}
        for path in compared.out.glob("runs/*/*/conditions.json"):
            start = load(path.parent / "run.json")["start"], load(path)["batches"]
            begins[path.parent.name.partition("-")[2]].add(start)
        ((start, batches),), ((other_start, other_batches),) = begins.values()
        assert start != other_start
        assert batches != other_batches

    def test_curves_are_those_of_the_runs(self, compared: Compared) -> None:
        row = compared.results["methods"]["HO-SFL"]
        number = [trial["point"] for trial in row["trials"]].index(row["point"])
        runs = [
            list(
                csv.DictReader(
                    (compared.run("HO-SFL", f"{number}-seed{seed}") / "metrics.csv").read_text().splitlines()
                )
            )
            for seed in (0, 1)
        ]
        assert [point["round"] for point in row["curve"]] == [0, 2, 4]
        first, *later = row["curve"]
        assert (first["bytes"], first["client_forwards"]) == (0, 0)
        for point in later:
            rows = [run[int(point["round"])] for run in runs]
            losses = [float(one["val/loss"]) for one in rows]
            assert point["loss"] == pytest.approx(
                {"mean": sum(losses) / 2, "low": min(losses), "high": max(losses)}, abs=1e-12
            )
            assert point["bytes"] == sum(float(one["comm/total_bytes"]) for one in rows) / 2
            assert point["client_forwards"] == 2 * point["round"] * row["client_forwards_per_round"]

    def test_costs_are_those_of_the_wire(self, compared: Compared) -> None:
        for name in NAMES[:3]:
            row = compared.results["methods"][name]
            assert row["bytes_up_per_client_round"] == row["bytes_up"] / (4 * 2)
            assert row["bytes_up"] + row["bytes_down"] == row["curve"][-1]["bytes"]
            assert row["client_forwards"] == row["curve"][-1]["client_forwards"]

    def test_the_controls_are_found_by_their_class(self, compared: Compared) -> None:
        methods, target = compared.results["methods"], compared.results["target"]
        assert methods["frozen"]["below_frozen"] == {"mean": 0, "sd": 0}
        assert target == {"metric": "loss", "value": methods["frozen"]["validation_loss"]["mean"]}
        losses = {name: methods[name]["loss"]["values"] for name in NAMES[:3]}
        below = [losses["frozen"][seed] - losses["HO-SFL"][seed] for seed in "01"]
        assert methods["HO-SFL"]["below_frozen"]["mean"] == pytest.approx(sum(below) / 2)

    def test_a_method_whose_points_all_diverge_is_shown_as_failed(self, compared: Compared) -> None:
        row = compared.results["methods"]["wild"]
        assert (row["point"], row["seeds"]) == (None, [])
        assert [trial["val/loss"] for trial in row["trials"]] == [None, None]
        assert all("the client half is not finite" in point["reason"] for point in row["failed_points"])
        assert "| wild | failed |" in compared.table
        assert "**Failed** at client_lr 1e+38" in compared.table

    def test_the_table_says_how_it_was_made(self, compared: Compared) -> None:
        made = compared.results["made"]
        assert f"`hosfl compare --config={compared.config} --out={compared.out}`" in compared.table
        assert made["date"] in compared.table and made["machine"] in compared.table
        assert "4 rounds; seeds 0, 1; 2 grid point(s) a method, chosen by val/loss at seed 0" in compared.table
        assert "†" not in compared.table  # of two values one is always at the edge
        assert "Unequally tuned servers" in compared.table

    def test_pictures_are_there(self, compared: Compared) -> None:
        for name in ("rounds", "bytes", "client_forwards", "memory"):
            assert (compared.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    def test_a_finished_comparison_runs_nothing_again(self, compared: Compared, tmp_path: Path) -> None:
        out = shutil.copytree(compared.out, tmp_path / "out")
        times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")}
        hosfl("compare", f"--config={compared.config}", f"--out={out}")
        assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")} == times
        assert comparable(load(out / "results.json")) == comparable(compared.results)


@pytest.mark.parametrize(("method", "moved", "passes"), [(HOSFL(), True, 1), (HOSFL(), False, 0), (FedAvg(), True, 0)])
def test_only_a_client_half_that_moved_is_put_back(
    make_model: Callable[..., SplitCausalLM], method: Algorithm, moved: bool, passes: int
) -> None:
    command, model = Evaluate.__new__(Evaluate), make_model()
    start = {name: bits.clone() for name, bits in model.trained_state().items()}
    tested: list[bool] = []

    def test(model: SplitCausalLM, data: Any) -> list[dict[str, float]]:
        state = model.trained_state()
        tested.append(all(torch.equal(state[n], start[n]) == n.startswith("client_half.") for n in start))
        return [{"test/loss": 4.0}]

    trainer = SimpleNamespace(
        algorithm=method, callback_metrics={"test/loss": 3.0}, is_global_zero=False, test=test, own_halves={}
    )
    command.model, command.datamodule, command.trainer = model, None, trainer  # type: ignore[assignment]
    command.before_test()
    with torch.no_grad():
        for parameter in [*model.client_parameters.values()] * moved + [*model.server_parameters.values()]:
            parameter.add_(1)
    command.after_test()
    assert tested == [True] * passes
    assert command.values == {"test/loss": 3.0} | ({"client_put_back/loss": 4.0} if passes else {})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("run.json", {"starts": {"server_half": {"weights": "other"}}}, "initial weights of the server"),
        ("run.json", {"starts": {"client_half": {"weights": "other"}}}, "initial weights of the client"),
        ("conditions.json", {"batches": "other"}, "batches"),
    ],
)
def test_unequal_conditions_stop_the_comparison(
    compared: Compared, tmp_path: Path, name: str, change: dict[str, Any], words: str
) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")
    path = out / "runs" / "frozen" / "1-seed0" / name
    path.write_text(json.dumps(merged(load(path), change)))
    comparison = parse(Comparison, "", [f"--config={compared.config}", f"--out={out}"])
    with pytest.raises(ComparisonError, match=f"differ in their {words} under seed 0, so they cannot be compared"):
        Runner(comparison).run()


def test_rows_may_differ_in_the_adapter_of_their_clients(compared: Compared, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(compared.out / "runs" / name / "0-seed0", tmp_path / name)) for name in NAMES[:2]]
    path = folders[0] / "run.json"
    path.write_text(json.dumps(merged(load(path), {"starts": {"client_half": {"tensors": "others", "weights": "x"}}})))
    assert unequal((folder.name, 0, folder) for folder in folders) is None


def merged(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``values`` with some of them changed, at any depth."""
    nested = {key: merged(values[key], value) for key, value in change.items() if isinstance(value, dict)}
    return {**values, **change, **nested}


def test_an_interrupt_says_how_to_go_on(compared: Compared, tmp_path: Path) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")
    comparison = parse(Comparison, "", [f"--config={compared.config}", f"--out={out}"])

    class Interrupted(Runner):
        def choose(self, method: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted; the same command goes on where it stopped"):
        Interrupted(comparison).run()


def test_killed_and_resumed_is_never_killed(compared: Compared, tmp_path: Path) -> None:
    """SIGKILL while runs are under way; the workers end as well, and what was finished is not run again."""
    out = tmp_path / "out"
    arguments = ["compare", f"--config={compared.config}", f"--out={out}", "--jobs=1"]
    code = "import sys; from hosfl_lightning.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    parent = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment)
    try:
        wait_for(lambda: len(under_way(out)) > 0 and len(finished(out)) > 1, parent)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(alive(child) for child in children))
    before, left = finished(out), {path: path.stat().st_ino for path in under_way(out)}
    assert left
    assert not (out / "results.json").exists()
    hosfl(*arguments)
    assert finished(out).items() >= before.items()
    assert {path: path.stat().st_ino for path in left} == left  # they went on in their folders
    assert comparable(load(out / "results.json")) == comparable(compared.results)


def finished(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/conditions.json")}


def under_way(out: Path) -> set[Path]:
    return {path.parent for path in out.glob("runs/*/*/run.json")} - {path.parent for path in finished(out)}


def wait_for(condition: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.005)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_rehearsal_is_remembered_with_the_settings(compared: Compared) -> None:
    known = load(compared.out / "comparison.json")
    assert known["settings"]["recipe"] == yaml.safe_load((compared.config.parent / "recipe.yaml").read_text())
    for name in NAMES:
        one = known["rehearsals"][name]
        assert (one["validation"], one["spent"]["samples"]) == (8, 4)
        assert one["test"] > 0
        assert one["data"].startswith("TextData (data.init_args.test_files")
    assert not (compared.out / "rehearsal").exists()
