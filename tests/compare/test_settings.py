"""What a comparison refuses, in one line and before anything is run or written."""

from __future__ import annotations

import copy
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning.compare import worker
from hosfl_lightning.compare.command import parse, untuned
from hosfl_lightning.compare.configs import write_config
from hosfl_lightning.compare.runner import Runner
from hosfl_lightning.compare.settings import Comparison, ComparisonError, Method, flat
from hosfl_lightning.compare.worker import Rehearsal
from tests.compare.conftest import Compared, hosfl
from tests.compare.tiny import METHODS, write
from tests.recipe_runs import ROOT, command_line, header_commands, name_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


def methods(**changes: Any) -> dict[str, Any]:
    """`METHODS` with another first method."""
    return {**METHODS, "HO-SFL": {**METHODS["HO-SFL"], **changes}}


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"budget": {"rounds": 3, "samples": 9}}, ["budget", "exactly one", "rounds=3, samples=9"]),
    ({"budget": {}}, ["budget", "exactly one", "none"]),
    ({"budget": {"bytes": 0}}, ["budget", "above 0"]),
    ({"budget": {"hours": 2}}, ["budget", "hours"]),
    ({"methods": {}}, ["methods", "none"]),
    ({"first_order": "SplitFed"}, ["first_order: 'SplitFed' is not one of HO-SFL"]),
    ({"methods": methods(grid=[{"client_lr": 0.1}])}, ["HO-SFL 1, frozen 2", "same number of learning rates"]),
    ({"methods": methods(gird=[])}, ["gird"]),
    ({"methods": methods(overrides={"data.init_args.batch_size": 9})}, ["methods.HO-SFL.overrides", "same for all"]),
    ({"methods": methods(grid=[{"trainer.clients_per_round": 1}] * 2)}, ["methods.HO-SFL.grid", "same for all"]),
    ({"methods": methods(overrides={"trainer.precision": "bf16-true"})}, ["trainer.precision is the same for all"]),
    ({"methods": methods(overrides={"trainer": {"min_clients": 2}})}, ["trainer.min_clients is the same for all"]),
    ({"methods": methods(grid=[{"trainer.gradient_clip_val": 1}] * 2)}, ["gradient_clip_val is the same for all"]),
    ({"methods": {"a/b": METHODS["frozen"]}}, ["a/b", "folder"]),
    ({"overrides": {"trainer.max_rounds": 3}}, ["overrides", "trainer.max_rounds", "by the comparison"]),
    ({"overrides": {"data": {"init_args.seed": 3}}}, ["data.init_args.seed", "by the comparison"]),
    ({"seeds": []}, ["seeds", "at least one"]),
    ({"seeds": [1, 1]}, ["seeds", "once"]),
    ({"jobs": 3}, ["jobs=3"]),
    ({"validations": 0}, ["validations=0"]),
    ({"only": ["frozen", "nobody"]}, ["only", "nobody", "frozen"]),
    ({"recipe": "nowhere.yaml"}, ["recipe", "nowhere.yaml"]),
    ({"mode": "best"}, ["mode", "best"]),
]


@pytest.mark.parametrize(
    ("settings", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_settings_end_with_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], words: list[str]
) -> None:
    config = write(folder, **settings)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        hosfl("compare", f"--config={config}", f"--out={tmp_path / 'out'}")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hosfl: error: ")
    assert [word for word in words if word not in line] == []
    assert not (tmp_path / "out").exists()


def comparison(folder: Path, *args: str, **settings: Any) -> Comparison:
    given = parse(Comparison, "hosfl compare", [f"--config={write(folder, **settings)}", f"--out={folder}/out", *args])
    given.check()
    return given


REHEARSAL = Rehearsal({"samples": 4, "bytes": 0.0}, ["val/loss", "val/perplexity"], 8, 8, "Text (data.init_args.test)")


@pytest.mark.parametrize(
    ("settings", "changed", "words"),
    [
        ({}, {"test": 0}, ["grid of 2 points", "no test set", "data.init_args.test"]),
        ({}, {"validation": 0}, ["no validation set"]),
        ({"metric": "accuracy"}, {}, ["metric: HO-SFL logs no val/accuracy; it logs val/loss, val/perplexity"]),
        ({"tuning": {"metric": "loss"}}, {}, ["tuning.metric", "no loss"]),
        ({"target": {"metric": "f1", "value": 1}}, {}, ["target.metric", "val/f1"]),
        ({"budget": {"bytes": 9}}, {}, ["budget.bytes", "spends none"]),
    ],
)
def test_what_only_the_first_round_shows(
    folder: Path, settings: dict[str, Any], changed: dict[str, Any], words: list[str]
) -> None:
    runner = Runner(comparison(folder, **settings))
    with pytest.raises(ComparisonError) as refused:
        runner.check({"HO-SFL": Rehearsal(**{**vars(REHEARSAL), **changed})})
    assert [word for word in words if word not in str(refused.value)] == []


def test_one_point_needs_no_test_set(folder: Path) -> None:
    one = {name: {**method, "grid": method["grid"][:1]} for name, method in METHODS.items()}
    Runner(comparison(folder, methods=one)).check({"HO-SFL": Rehearsal(**{**vars(REHEARSAL), "test": 0})})


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"trainer.algorithm.init_args.probez": 3}, ["methods.HO-SFL: ", "probez"]),
        ({"client_lr": "fast"}, ["methods.HO-SFL: ", "fast"]),
        ({"model.init_args.cut": 7}, ["methods.HO-SFL: ", "cut=7"]),
    ],
)
def test_a_bad_recipe_is_refused_at_its_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: dict[str, Any], words: list[str]
) -> None:
    """Whichever of its points is bad; but a model is built for the first alone."""
    grid = [{}, point] if "model.init_args.cut" not in point else [point, {}]
    runner = Runner(comparison(tmp_path, methods=methods(grid=grid)))
    jobs = [runner.job("HO-SFL", number, 0) for number in range(2)]
    for job in jobs:
        write_config(job, runner.comparison, runner.base, 1, 1)
    monkeypatch.setattr(worker, "print_into", lambda path: None)  # it would take pytest's own output along
    with command_line(), pytest.raises(ComparisonError) as refused:
        worker.rehearse(jobs)
    assert [word for word in words if word not in str(refused.value)] == []


def test_another_comparison_in_the_folder_is_refused(compared: Compared, tmp_path: Path) -> None:
    shutil.copy(compared.out / "comparison.json", tmp_path)
    other = parse(Comparison, "", [f"--config={compared.config}", f"--out={tmp_path}", "--seeds=[0,5]"])
    with pytest.raises(ComparisonError, match=r"another comparison, which differs in seeds; give another folder"):
        Runner(other).run()


def test_a_changed_recipe_is_another_comparison(compared: Compared, tmp_path: Path) -> None:
    known = json.loads((compared.out / "comparison.json").read_text())
    known["settings"]["recipe"]["data"]["init_args"]["batch_size"] = 3
    (tmp_path / "comparison.json").write_text(json.dumps(known))
    with pytest.raises(ComparisonError, match=r"differs in recipe\.data\.init_args\.batch_size;"):
        Runner(parse(Comparison, "", [f"--config={compared.config}", f"--out={tmp_path}"])).run()


def test_two_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    runner = Runner(comparison(folder, f"--out={tmp_path}"))
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ComparisonError, match="another process compares in"):
            runner.run()


def test_settings_on_the_command_line(folder: Path) -> None:
    given = comparison(folder, "--seeds=[4]", "--overrides.model.init_args.cut=1", "--only=[frozen]", "--jobs=1")
    assert (given.seeds, given.jobs, [*given.methods]) == ([4], 1, ["frozen"])
    assert flat(given.overrides) == {"model.init_args.cut": 1}


def test_a_budget_on_the_command_line_takes_the_place_of_the_files(folder: Path) -> None:
    config = write(folder, budget={"samples": 480})
    args = [f"--config={config}", f"--out={folder}/out"]
    assert (parse(Comparison, "", args).budget.kind, parse(Comparison, "", args).budget.value) == ("samples", 480)
    for own in (["--budget.rounds", "2"], ["--budget.bytes=9", "--budget.rounds=2"]):
        given = parse(Comparison, "", [*args, *own])
        given.check()
        assert (given.budget.kind, given.budget.value) == ("rounds", 2)


def test_one_grid_point_alone(folder: Path) -> None:
    given = comparison(folder, "--point=1", "--only=[HO-SFL, frozen]")
    for _ in range(2):  # the second changes nothing
        given.check()
        assert [method.grid for method in given.methods.values()] == [[METHODS[n]["grid"][1]] for n in given.methods]
    with pytest.raises(ComparisonError, match="point=2: the grids have points 0 to 1"):
        comparison(folder, "--point=2")


def test_names_with_commas_are_told_apart(folder: Path) -> None:
    named = {"HO-SFL, dense": METHODS["HO-SFL"], "frozen": METHODS["frozen"]}
    given = parse(
        Comparison, "", [f"--config={write(folder, methods=named)}", f"--out={folder}/out", "--only=[nobody]"]
    )
    with pytest.raises(ComparisonError, match="only: 'nobody' is not one of 'HO-SFL, dense', frozen"):
        given.check()


def test_overrides_on_the_command_line_stand_beside_each_other_and_over_the_file(folder: Path) -> None:
    own = {"data.init_args.num_clients": 2, "model": {"init_args": {"cut": 2}}}
    args = ["--overrides.data.init_args.train=[a, b]", "--overrides.data.init_args.test", "e",
            "--overrides.model.init_args.cut=1"]  # fmt: skip
    given = parse(Comparison, "", [f"--config={write(folder, overrides=own)}", f"--out={folder}/out", *args])
    assert given.overrides == {
        "data.init_args.num_clients": 2, "data.init_args.train": ["a", "b"], "data.init_args.test": "e",
        "model.init_args.cut": 1,
    }  # fmt: skip


@pytest.mark.parametrize("rest", [["--out", "X"], []])
def test_an_override_without_a_value_takes_no_other_option_for_it(
    folder: Path, capsys: pytest.CaptureFixture[str], rest: list[str]
) -> None:
    config = write(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        hosfl("compare", f"--config={config}", "--overrides.model.init_args.cut", *rest)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "--overrides.model.init_args.cut: a value is missing; give --overrides.model.init_args.cut=VALUE"
    )
    given = parse(
        Comparison, "", [f"--config={config}", f"--out={folder}/out", "--overrides.model.init_args.cut", "-1"]
    )
    assert given.overrides == {"model.init_args.cut": -1}


def test_flat_keys() -> None:
    rule = {"class_path": "SGD", "init_args": {"lr": 1}}
    nested = {"server_lr": 1, "a": {"b.c": {"d": 2}, "e": rule}, "f": {}}
    assert flat(nested) == {"model.init_args.optimizer.init_args.lr": 1, "a.b.c.d": 2, "a.e": rule, "f": {}}


def test_servers_that_were_not_tuned_alike_are_told_of(folder: Path) -> None:
    given = comparison(folder)
    (note,) = untuned(given)
    assert "frozen: 0.01, 0.03; first order: the recipe's" in note
    for one in given.methods.values():
        one.grid = [{**point, "server_lr": 0.02} for point in one.grid]
    assert untuned(given) == []
    wider = copy.deepcopy(given.methods["frozen"])
    given.methods["frozen"] = Method([{"server_lr": 0.02}, {"server_lr": 0.5}], wider.algorithm)
    given.methods["FedAvg"] = Method([{}], {"class_path": "hosfl_lightning.algorithms.FedAvg"})
    assert untuned(given) == []


def test_a_catalogue_knows_methods(folder: Path) -> None:
    known = {"algorithm": {"class_path": "hosfl_lightning.algorithms.Frozen"}, "overrides": {"a": 1, "b": 1}}
    (folder / "methods.yaml").write_text(yaml.safe_dump({"known": known, "other": known}))
    rows = {"known": {"grid": [{}], "overrides": {"b": 2}}, "frozen": {**METHODS["frozen"], "grid": [{}]}}
    given = comparison(folder, catalogue="methods.yaml", methods=rows)
    assert given.methods["known"] == Method([{}], known["algorithm"], {"a": 1, "b": 2})
    assert given.methods["frozen"].algorithm["class_path"] == METHODS["frozen"]["algorithm"]["class_path"]
    with pytest.raises(ComparisonError, match=r"methods\.nobody: give its algorithm, .*; it has known, other"):
        comparison(folder, catalogue="methods.yaml", methods={"nobody": {"grid": [{}]}})


SHIPPED = [path for path in sorted((ROOT / "recipes" / "compare").glob("*.yaml")) if path.stem != "methods"]


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_the_shipped_comparisons_are_sound(path: Path, tmp_path: Path) -> None:
    command, kind, *words = header_commands(path)[0]
    assert (command, kind) == ("hosfl", "compare")
    assert words[:2] == ["--config", name_of(path)]
    with command_line():
        given = parse(Comparison, "", [*words, f"--out={tmp_path}"])
    given.check()
    assert given.grid_size > 1
    assert {"Frozen", "SplitFedSGD"} <= {m.algorithm["class_path"].rpartition(".")[2] for m in given.methods.values()}
    assert untuned(given) == []
