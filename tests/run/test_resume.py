"""Killed and resumed = never killed: at every write of a run, and in every way to ask for it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger as StockCSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from hosfl_lightning import Orchestrator
from hosfl_lightning.availability import Always
from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.run.checkpoint import CheckpointError, callback_states, load, save
from hosfl_lightning.server.replay_log import ReplayLog, WitnessError
from tests.faults import Killed, count_writes, disk_states, killed_at
from tests.small_run import SmallRun, contents, plain


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    with count_writes():
        yield


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def held(trainer: Orchestrator) -> Any:
    """All that a finished run holds in memory: parameters, optimizers, schedules, absentees, callbacks."""
    parameters = {"state_dict": trainer.lightning_module.trained_state()}
    return plain({**trainer.saving.collect(False), **parameters, "callbacks": callback_states(trainer.callbacks)})


def put_back(state: Path, run: SmallRun) -> None:
    shutil.rmtree(run.folder.parent, ignore_errors=True)
    if state.exists():
        shutil.copytree(state, run.folder.parent)


def checkpoint_at(run: SmallRun, round: int) -> Path:
    return run.folder / "checkpoints" / f"step={round}.ckpt"


def stop_before(round: int) -> Callback:
    class Interrupts(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == round:
                raise KeyboardInterrupt

    return Interrupts()


def interrupted(run: SmallRun, round: int, **settings: Any) -> SmallRun:
    with pytest.raises(KeyboardInterrupt):
        run.fit(stop_before(round), **settings)
    return run


class TestFaults:
    @pytest.mark.parametrize("momentum", [False, True], ids=["adamw, batched", "momentum, per client"])
    def test_wherever_it_is_killed_a_resumed_run_ends_as_one_that_was_not(self, tmp_path: Path, momentum: bool) -> None:
        run = SmallRun(tmp_path, momentum, momentum, {"simulation": "per_client" if momentum else "batched"})
        with disk_states(run.folder.parent, tmp_path / "states") as states:
            expected = held(run.fit())
        files, resumed_at = contents(run.folder), []
        for state in states[:: -3 if momentum else 1]:
            put_back(state, run)
            if not (run.folder / "run.json").exists():
                with pytest.raises(CheckpointError, match=r"no (file|run\.json).*|.* begin anew without ckpt_path"):
                    run.fit(ckpt_path=run.folder)
                continue
            resumed_at.append(max((load(p)["global_step"] for p in run.folder.glob("checkpoints/*.ckpt")), default=0))
            assert held(run.fit(ckpt_path=run.folder)) == expected, state
            assert contents(run.folder) == files, state
        assert set(resumed_at) == {0, 2, 4}
        assert len(resumed_at) >= (6 if momentum else 20)

    def test_killed_after_the_rounds(self, tmp_path: Path) -> None:
        run = SmallRun(tmp_path, settings={"controls": ["frozen"]})
        with disk_states(run.folder.parent, tmp_path / "states") as states:
            run.fit()
        files = contents(run.folder)
        assert set(files["summary.json"]["controls"]) == {"frozen"}
        late = [state for state in states if (state / "version_0" / "adapter").exists()]
        assert len(late) >= 5
        for state in late[::-2]:
            put_back(state, run)
            run.fit(ckpt_path=run.folder)
            assert contents(run.folder) == files, state

    def test_a_run_that_dies_leaves_what_was_on_the_disk(self, run: SmallRun, tmp_path: Path) -> None:
        """So that the states above are those that kills leave: cleanup code adds nothing to them."""
        with count_writes() as calls:
            run.fit()
        shutil.rmtree(run.folder.parent)
        with disk_states(run.folder.parent, tmp_path / "states") as states:
            run.fit()
        known = [visible(state) for state in states]
        for n in range(3, len(calls), 9):
            shutil.rmtree(run.folder.parent, ignore_errors=True)
            with pytest.raises(Killed), killed_at(n):
                run.fit()
            assert visible(run.folder.parent) in known, (n, calls[n])

    def test_wherever_a_run_that_goes_back_is_killed_it_can_go_on(self, tmp_path: Path) -> None:
        run = SmallRun(tmp_path, keep=True)
        run.fit()
        files = contents(run.folder)
        with disk_states(run.folder.parent, tmp_path / "states") as states:
            run.fit(ckpt_path=checkpoint_at(run, 2))
        assert len(states) >= 8
        for state in states:
            put_back(state, run)
            run.fit(ckpt_path=run.folder)
            left = contents(run.folder)
            left.pop("checkpoints/step=4.ckpt.later", None)
            assert left == files, state


def without_record(folder: Path) -> None:
    """As an earlier version left it."""
    known = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({k: v for k, v in known.items() if k not in ("record", "settings")}))
    for path in (folder / "checkpoints").glob("*.ckpt"):
        save({name: value for name, value in load(path).items() if name != "record"}, path)


def visible(folder: Path) -> dict[str, Any]:
    return {name: content for name, content in contents(folder).items() if ".part" not in name}


class TestWays:
    def test_interrupted_and_given_the_folder(self, run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
        expected = held(run.fit())
        files = contents(run.folder)
        shutil.rmtree(run.folder)
        trainer = run.trainer(stop_before(3))
        with pytest.raises(KeyboardInterrupt, match=rf"interrupted; go on with --ckpt_path={run.folder}"):
            trainer.fit(run.model(), run.data())
        with pytest.raises(CheckpointError, match="may be that of no round; go on with"):
            trainer.save_checkpoint(str(run.folder / "checkpoints" / "z.ckpt"))
        assert held(run.fit(ckpt_path=run.folder)) == expected
        assert contents(run.folder) == files
        assert "controls" not in files

    def test_interrupted_before_the_first_round(self, run: SmallRun) -> None:
        class Interrupts(Callback):
            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match="no round had begun: start it anew"):
            run.fit(Interrupts())

    def test_a_checkpoint_cannot_delete_or_write_outside_of_its_folder(self, run: SmallRun, tmp_path: Path) -> None:
        interrupted(run, 3)
        kept = [tmp_path / "mine.ckpt", run.folder / "notes.txt"]
        for file in kept:
            file.write_text("mine")
        path = checkpoint_at(run, 2)
        names = [str(kept[0]), os.path.relpath(kept[0], run.folder), "notes.txt"]
        foreign = dict.fromkeys(names) | {"../written.ckpt": False}
        save({**load(path), "files": foreign}, path)
        run.fit(ckpt_path=path)
        assert [file.read_text() for file in kept] == ["mine", "mine"]
        assert not (run.folder.parent / "written.ckpt").exists()

    def test_more_rounds(self, run: SmallRun) -> None:
        expected = held(run.fit())
        files = contents(run.folder)
        shutil.rmtree(run.folder)
        run.fit(max_rounds=2)
        assert held(run.fit(ckpt_path=run.folder)) == expected
        assert contents(run.folder) == files

    def test_an_earlier_checkpoint(self, tmp_path: Path) -> None:
        run = SmallRun(tmp_path, keep=True)
        run.fit()
        files = contents(run.folder)
        interrupted_again = run.trainer(stop_before(3))
        with pytest.raises(KeyboardInterrupt):
            interrupted_again.fit(run.model(), run.data(), ckpt_path=str(checkpoint_at(run, 2)))
        assert [row["step"] for row in contents(run.folder)["metrics.csv"]] == ["0", "1", "2", "3"]
        assert ReplayLog.read(run.folder / "updates.log").rounds == 4, "later records are witnesses"
        assert not checkpoint_at(run, 4).exists(), "the folder's last checkpoint must not be beyond its metrics"
        run.fit(ckpt_path=run.folder)
        left = contents(run.folder)
        assert left.pop("checkpoints/step=4.ckpt.later") == files["checkpoints/step=4.ckpt"]
        assert left == files

    def test_a_checkpoint_without_its_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = SmallRun(tmp_path, keep=True)
        settings: dict[str, Any] = {"availability": Always()}
        expected = held(run.fit(**settings))
        out = shutil.copy(checkpoint_at(run, 2), tmp_path / "copy.ckpt")
        capsys.readouterr()
        with pytest.warns(UserWarning, match="dirpath has changed"):
            trainer = run.fit(ckpt_path=out, **settings)
        new = Path(trainer.log_dir)
        assert new.name == "version_1"
        assert f"Going on in {new} without an update log: rounds 0 to 1 are not in it." in capsys.readouterr().out
        assert not (new / "updates.log").exists()
        got = held(trainer)
        for key in ("state_dict", "optimizer_states", "method", "lr_schedulers", "validations", "refused"):
            assert got[key] == expected[key]
        assert [row["step"] for row in contents(new)["metrics.csv"]] == ["3", "4"]
        again = interrupted(run, 3, **settings).fit(ckpt_path=run.root / "runs" / "version_1", **settings)
        assert again.log_dir == str(new), "the new folder is a run's own from then on"

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_clients_that_were_away_cannot_do_without_the_log(self, tmp_path: Path) -> None:
        run = SmallRun(tmp_path, keep=True)
        run.fit()
        out = shutil.copy(checkpoint_at(run, 2), tmp_path / "copy.ckpt")
        with pytest.raises(CheckpointError, match="clients that were away replay the update log"):
            run.fit(ckpt_path=out)

    def test_a_run_without_a_log(self, run: SmallRun) -> None:
        settings: dict[str, Any] = {"availability": Always(), "replay_log": False}
        expected = held(run.fit(**settings))
        files = contents(run.folder)
        shutil.rmtree(run.folder)
        interrupted(run, 3, **settings)
        assert held(run.fit(ckpt_path=run.folder, **settings)) == expected
        assert contents(run.folder) == files
        assert "updates.log" not in files

    def test_a_torn_checkpoint_is_passed_over(self, tmp_path: Path) -> None:
        run = SmallRun(tmp_path, keep=True)
        run.fit()
        files = contents(run.folder)
        last = checkpoint_at(run, 4)
        last.write_bytes(last.read_bytes()[:-100])
        with pytest.warns(UserWarning, match=r"step=4.ckpt' is not a whole.*; it is passed over"):
            run.fit(ckpt_path=run.folder)
        last.unlink()
        last.with_name("step=4-v1.ckpt").rename(last)  # as ModelCheckpoint calls it where the name is taken
        left = contents(run.folder)
        assert {name for name in files if left.get(name) != files[name]} == {"checkpoints/step=4.ckpt"}

    def test_stopped_early_stays_stopped(self, run: SmallRun) -> None:
        def stops() -> EarlyStopping:
            return EarlyStopping("val/loss", patience=1, min_delta=10.0)

        trainer = run.fit(stops())
        expected, files = held(trainer), contents(run.folder)
        assert trainer.global_step == 2
        assert held(run.fit(stops(), ckpt_path=run.folder)) == expected
        assert contents(run.folder) == files
        assert run.fit(ckpt_path=run.folder, max_rounds=6).global_step == 6, "unless it is given more rounds"

    def test_the_end_is_validated_where_the_recipe_now_ends(self, run: SmallRun) -> None:
        settings: dict[str, Any] = {"val_check_interval": 4, "callbacks": [ModelCheckpoint(every_n_train_steps=3)]}
        run.fit(**settings)
        trainer = run.fit(ckpt_path=next(run.folder.glob("checkpoints/*step=3.ckpt")), max_rounds=3, **settings)
        assert trainer.run.result is not None
        assert trainer.run.result.last.round == 3


class TestRefused:
    @pytest.mark.parametrize(
        ("rounds", "settings", "message"),
        [
            (3, {"seed": 1}, r"trainer\.seed is 1, the run was made with 0; a run that goes on keeps its settings"),
            (1, {"seed": 1}, r"trainer\.seed is 1, the run was made with 0"),
            (3, {"clients_per_round": 3}, r"trainer\.clients_per_round is 3, the run was made with 2"),
        ],
    )
    def test_another_recipe_leaves_the_folder_as_it_is(
        self, run: SmallRun, rounds: int, settings: dict[str, Any], message: str
    ) -> None:
        interrupted(run, rounds)
        before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        with pytest.raises(CheckpointError, match=message):
            run.fit(ckpt_path=run.folder, **settings)
        assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before

    def test_what_no_record_holds_is_found_out_by_the_witnesses(self, run: SmallRun) -> None:
        interrupted(run, 1)
        (run.folder / "checkpoints" / "last.ckpt").unlink(missing_ok=True)
        without_record(run.folder)
        data = run.data()
        data.seed = 1
        with pytest.raises(WitnessError, match="round 0, executed again, differs from the update on record"):
            run.trainer().fit(run.model(), data, ckpt_path=str(run.folder))

    @pytest.mark.parametrize("rounds", [1, 3])
    def test_a_log_that_would_go_stale(self, run: SmallRun, rounds: int) -> None:
        settings: dict[str, Any] = {"availability": Always()}
        interrupted(run, rounds, **settings)
        with pytest.raises(
            CheckpointError, match=r"which would lack the rounds to come; set trainer\.replay_log: true"
        ):
            run.fit(ckpt_path=run.folder, replay_log=False, **settings)

    def test_a_folder_that_is_no_runs(self, run: SmallRun, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no run.json, .* begin anew without ckpt_path"):
            run.fit(ckpt_path=tmp_path)

    def test_controls_with_a_model_that_is_not_at_the_start(self, run: SmallRun) -> None:
        interrupted(run, 3, controls=["frozen"])
        model = run.model()
        next(iter(model.client_parameters.values())).data.add_(1)
        with pytest.raises(ValueError, match="this model has been trained since: build it anew"):
            run.trainer(controls=["frozen"]).fit(model, run.data(), ckpt_path=str(run.folder))
        run.trainer().fit(model, run.data(), ckpt_path=str(run.folder))  # without them it is all the same

    def test_lightnings_csv_logger(self, run: SmallRun) -> None:
        interrupted(run, 1)
        with pytest.raises(ValueError, match=r"use hosfl_lightning\.loggers\.CSVLogger"):
            run.fit(ckpt_path=run.folder, logger=StockCSVLogger(str(run.root / "runs"), name=""))

    def test_controls_with_a_server_half_that_is_not_at_the_start(self, run: SmallRun) -> None:
        interrupted(run, 3)
        model = run.model()
        next(iter(model.server_parameters.values())).data.add_(1)
        with pytest.raises(ValueError, match="this model has been trained since: build it anew"):
            run.trainer(controls=["frozen"]).fit(model, run.data(), ckpt_path=str(run.folder))

    @pytest.mark.parametrize("kind", [ModelCheckpoint, OnExceptionCheckpoint])
    def test_a_checkpoint_of_an_exception(self, run: SmallRun, kind: Any) -> None:
        callback = kind(".") if kind is OnExceptionCheckpoint else kind(save_on_exception=True)
        with pytest.raises(ValueError, match="would save the middle of a round"):
            run.trainer(callback)


class TestUsedFolder:
    """Runs that are told to share a folder."""

    def settings(self, run: SmallRun) -> dict[str, Any]:
        logger = CSVLogger(str(run.root), name="", version="runs")
        return {"logger": logger, "availability": Always(), "replay_log": False}

    @pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")
    def test_the_run_that_goes_on_is_the_last(self, run: SmallRun) -> None:
        folder = run.root / "runs"
        run.fit(**self.settings(run) | {"max_rounds": 6})
        ended = load(folder / "checkpoints" / "last.ckpt")
        interrupted(run, 0, **self.settings(run))
        again = run.fit(ckpt_path=folder, **self.settings(run))
        assert again.run.result is not None
        assert len(again.run.result.seconds) == 4, "from its own start"
        assert plain(load(folder / "checkpoints" / "last.ckpt.before")) == plain(ended)

    @pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:Checkpoint directory")
    def test_killed_while_the_earlier_run_is_set_aside(self, run: SmallRun) -> None:
        run.fit(**self.settings(run))
        with pytest.raises(Killed), killed_at(1):
            run.fit(**self.settings(run))
        assert (run.root / "runs" / "checkpoints" / "last.ckpt").exists()
        with pytest.raises(CheckpointError, match=r"has no run\.json"):
            run.fit(ckpt_path=run.root / "runs", **self.settings(run))


class Elsewhere(DummyLogger):
    """As TensorBoard's: with a folder of its own."""

    log_dir = "elsewhere"


class TestLoggers:
    def test_a_logger_with_a_folder_of_its_own(self, run: SmallRun) -> None:
        expected = held(run.fit())
        files = contents(run.folder)
        shutil.rmtree(run.folder)
        interrupted(run, 3, logger=Elsewhere())
        trainer = run.fit(ckpt_path=run.folder, logger=Elsewhere())
        assert held(trainer) == expected
        assert contents(run.folder) == files

    def test_the_csv_logger_is_the_first(self, run: SmallRun) -> None:
        own, other = CSVLogger(str(run.root / "own"), name=""), Elsewhere()
        trainer = run.trainer(logger=[other, own])
        assert trainer.loggers == [own, other]
        assert trainer.log_dir == own.log_dir

    def test_the_id_at_wandb_outlives_a_part_without_it(self, run: SmallRun) -> None:
        interrupted(run, 3)
        identity = run.folder / "run.json"
        known = json.loads(identity.read_text()) | {"wandb": "abc"}
        identity.write_text(json.dumps(known))
        run.fit(ckpt_path=run.folder)
        assert json.loads(identity.read_text()) == known


def test_a_relative_root_stays_relative(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelCheckpoint forgets its best files when its folder has another name."""
    monkeypatch.chdir(run.root)
    settings: dict[str, Any] = {"default_root_dir": "runs"}
    expected = held(run.fit(**settings))
    shutil.rmtree(run.folder)
    with pytest.raises(KeyboardInterrupt):
        run.fit(stop_before(3), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held(run.fit(ckpt_path=run.folder, **settings)) == expected
