"""The W&B overlay: an offline run, read back from its own file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from hosfl_lightning import Control
from hosfl_lightning.algorithms import SplitFedSGD
from hosfl_lightning.optim import AdamW
from hosfl_lightning.run.folder import make_loggers
from hosfl_lightning.run.wandb_controls import control_loggers
from hosfl_lightning.split import LoraHalf
from tests.recipe_runs import OVERLAYS, QUICKSTART, header_commands, hosfl, load, small
from tests.small_run import SmallRun

OVERLAY = next(path for path in OVERLAYS if path.stem == "wandb")


@dataclass
class Logged:
    """What the offline file holds, and the run folder beside it."""

    records: list[dict[str, Any]]
    folder: Path

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def rows(self) -> list[dict[str, float]]:
        return [record["item"] for record in self.of("history")]

    @property
    def csv(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "metrics.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """The command in the overlay's header, made small; nothing leaves the folder."""
    root = tmp_path_factory.mktemp("wandb")
    with offline(root):
        _, *words = header_commands(OVERLAY)[0]
        place = f"--trainer.logger.init_args.save_dir={root}"
        trainer = hosfl(*words, *small(QUICKSTART, root), place, "--trainer.controls=[]").trainer
    (file,) = root.glob("wandb/offline-run-*/*.wandb")
    return Logged(read_whole(file), Path(trainer.log_dir))


@contextmanager
def offline(root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")  # WandbLogger sets it, so that it is put back here
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(root / name.lower()))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_SILENT", "true")
        yield


def read_whole(file: Path) -> list[dict[str, Any]]:
    """The records of an offline run; W&B may still be writing when its ``finish`` has returned."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    for _ in range(20):
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        records = [json.loads(line) for line in output.splitlines()]
        if any(record["type"] == "exit" for record in records):
            return records
        time.sleep(0.3)
    raise TimeoutError(f"no end of the run in {file}")


def test_the_overlay_is_what_the_file_says() -> None:
    assert load(OVERLAY)["trainer"]["logger"]["init_args"]["offline"] is True


def test_the_run_folder_stays_the_recipes(logged: Logged) -> None:
    assert logged.folder.parent.name == "runs"
    left = {path.name for path in logged.folder.iterdir()}
    assert left >= {"config.yaml", "metrics.csv", "checkpoints", "adapter", "summary.json"}


@pytest.mark.parametrize("name", ["train/loss", "val/loss", "client/projected_gradient_rms"])
def test_curves_go_over_rounds(logged: Logged, name: str) -> None:
    curve = {row["round"]: row[name] for row in logged.rows if name in row}
    assert curve == {int(row["round"]): pytest.approx(float(row[name])) for row in logged.csv if row[name]}
    assert list(curve) == ([0, 2] if name == "val/loss" else [1, 2])


def test_the_axis_is_the_round(logged: Logged) -> None:
    axes = [metric["step_metric"] for metric in logged.of("metric") if metric.get("glob_name") == "*"]
    assert axes[-1] == "round"
    assert all("round" in row for row in logged.rows)


def test_memory_and_bytes_are_there(logged: Logged) -> None:
    summary, first, last = json.loads((logged.folder / "summary.json").read_text()), logged.rows[0], logged.rows[-1]
    assert {name: first[f"memory/{name}"] for name in summary["memory"]} == summary["memory"]
    kinds, participations = summary["bytes_per_client_round"], 2 * summary["clients_per_round"]
    sent = {kind: sum(row.get(f"comm/{kind}_bytes", 0) for row in logged.rows) for kind in kinds}
    assert {kind: total / participations for kind, total in sent.items()} == pytest.approx(kinds)
    assert last["comm/total_bytes"] == pytest.approx(sum(kinds.values()) * participations)


def test_the_config_is_the_saved_one(logged: Logged) -> None:
    config: dict[str, Any] = {}
    for record in logged.of("config"):
        config |= record["update"]
    saved = load(logged.folder / "config.yaml")
    assert {name: config[name] for name in saved} == saved


def test_the_run_is_finished(logged: Logged) -> None:
    assert [record["exit_code"] for record in logged.of("exit")] == [0]
    assert wandb.run is None


class Interrupts(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    """Two offline files of one run: what was executed again is in both, with one `round` and equal values."""
    run = SmallRun(tmp_path)
    with offline(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            run.fit(Interrupts(), logger=WandbLogger(offline=True, save_dir=tmp_path))
        wandb.finish(exit_code=1)
        run.fit(ckpt_path=run.folder, logger=WandbLogger(offline=True, save_dir=tmp_path))
        wandb.finish()
    before, after = (Logged(read_whole(file), run.folder) for file in sorted(tmp_path.glob("wandb/offline-*/*.wandb")))
    (one,), (two,) = before.of("run"), after.of("run")
    assert one["run_id"] == two["run_id"] == json.loads((run.folder / "run.json").read_text())["wandb"]
    rows = [{row["round"]: measured(row) for row in part.rows} for part in (before, after)]
    assert [list(part) for part in rows] == [[0, 1, 2, 3], [3, 4]]
    assert rows[0][3] == rows[1][3]
    assert [int(row["round"]) for row in after.csv] == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Logged]]:
    """A run with two controls: what the file of each holds, by its job type and name."""
    root = tmp_path_factory.mktemp("controls")
    run = SmallRun(root)
    controls = ["frozen", Control("first, a:b", SplitFedSGD(AdamW(lr=1e-2)), LoraHalf(r=2, target_modules=["o_proj"]))]
    with offline(root):
        logger = WandbLogger(offline=True, save_dir=root, project="mine", name="mine", tags=["a"])
        run.fit(logger=logger, controls=controls)
        assert wandb.run is logger.experiment
        logger.experiment.log({"afterwards": 1.0})
        wandb.finish()
    files = [Logged(read_whole(file), run.folder) for file in root.glob("wandb/offline-*/*.wandb")]
    return run.folder, {one.of("run")[0].get("display_name", ""): one for one in files}


def test_controls_are_runs_of_the_runs_group(beside: tuple[Path, dict[str, Logged]]) -> None:
    folder, logged = beside
    known = json.loads((folder / "run.json").read_text())["wandb"]
    ids = {"mine": known, "mine frozen": f"{known}-frozen", "mine first, a:b": f"{known}-first--a-b"}
    assert {name: one.of("run")[0]["run_id"] for name, one in logged.items()} == ids
    for name, one in logged.items():
        (run, *_) = one.of("run")
        assert (run["project"], run["run_group"], run["tags"]) == ("mine", known, ["a"])
        assert run.get("job_type", "") == ("" if name == "mine" else "control")
        assert [record["exit_code"] for record in one.of("exit")] == [0]


def test_a_controls_curves_are_those_of_its_folder_and_its_config_says_what_it_is(
    beside: tuple[Path, dict[str, Logged]],
) -> None:
    folder, logged = beside
    for name, method in {"frozen": "Frozen", "first, a:b": "SplitFedSGD"}.items():
        own, one = folder / "controls" / name, logged[f"mine {name}"]
        rows = csv.DictReader((own / "metrics.csv").read_text().splitlines())
        expected = {int(row["round"]): row["train/loss"] for row in rows if row["train/loss"]}
        found = {row["round"]: row["train/loss"] for row in one.rows if "train/loss" in row}
        assert found == {round: pytest.approx(float(loss)) for round, loss in expected.items()} and len(found) == 4
        config = one.of("run")[0]["config"]["update"]
        known = {"control": name, "control_of": logged["mine"].of("run")[0]["run_id"], "algorithm": method}
        assert {key: config[key] for key in known} == known


def test_the_runs_own_rows_are_its_own_and_it_is_open_afterwards(beside: tuple[Path, dict[str, Logged]]) -> None:
    _, logged = beside
    *rows, last = logged["mine"].rows
    assert [int(row["round"]) for row in rows] == [int(row["round"]) for row in logged["mine"].csv] == [0, 1, 2, 3, 4]
    assert last["afterwards"] == 1.0


def test_a_group_that_was_given_is_the_controls_too(tmp_path: Path) -> None:
    with offline(tmp_path):
        logger = WandbLogger(offline=True, save_dir=tmp_path, project="mine", group="ours", id="abc")
        SmallRun(tmp_path).fit(logger=logger, controls=["frozen"])
        wandb.finish()
    runs = [read_whole(file) for file in sorted(tmp_path.glob("wandb/offline-*/*.wandb"))]
    found = {record["run"]["run_id"]: record["run"] for one in runs for record in one if record["type"] == "run"}
    assert {name: run["run_group"] for name, run in found.items()} == {"abc": "ours", "abc-frozen": "ours"}
    assert found["abc-frozen"]["display_name"] == "abc frozen"


def test_a_control_that_fails_ends_its_run_as_failed(tmp_path: Path) -> None:
    with offline(tmp_path):
        logger = WandbLogger(offline=True, save_dir=tmp_path, id="abc")
        with pytest.raises(KeyboardInterrupt), control_loggers([logger], "frozen", "Frozen"):
            raise KeyboardInterrupt
        assert wandb.run is logger.experiment
        wandb.finish()
    runs = [Logged(read_whole(file), tmp_path) for file in tmp_path.glob("wandb/offline-*/*.wandb")]
    codes = {one.of("run")[0]["run_id"]: [record.get("exit_code", 0) for record in one.of("exit")] for one in runs}
    assert codes["abc"] == [0] and codes["abc-frozen"] != [0]


def test_without_controls_or_with_w_and_b_disabled_there_is_no_group_and_no_other_run(tmp_path: Path) -> None:
    with offline(tmp_path):
        SmallRun(tmp_path / "a").fit(logger=WandbLogger(offline=True, save_dir=tmp_path), max_rounds=1)
        wandb.finish()
        logger = WandbLogger(mode="disabled", save_dir=tmp_path)
        SmallRun(tmp_path / "b").fit(logger=logger, max_rounds=1, controls=["frozen"])
        wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-*/*.wandb")
    (run,) = Logged(read_whole(file), tmp_path).of("run")
    assert not run.get("run_group")


def measured(row: dict[str, float]) -> dict[str, float]:
    """Without W&B's own values, and times."""
    return {name: value for name, value in row.items() if not name.startswith(("_", "time/"))}


def test_wandb_is_told_nothing_that_it_warns_of(tmp_path: Path) -> None:
    """Lightning passes ``anonymous`` whether or not it was asked for."""
    for given, kept in ((None, False), (True, True)):
        [_, logger] = make_loggers(WandbLogger(offline=True, save_dir=tmp_path, anonymous=given), str(tmp_path))
        assert ("anonymous" in logger._wandb_init) == kept  # type: ignore[attr-defined]
