"""A finished comparison that is given one more method, or one more seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning.compare.command import parse
from hosfl_lightning.compare.runner import Runner
from hosfl_lightning.compare.settings import Comparison, ComparisonError
from tests.compare.conftest import Compared, hosfl
from tests.compare.tiny import ADAMW, METHODS, method, rule

ADDED = "HO-SFL, one probe"
MORE = {ADDED: method("HOSFL", {"probes": 1, **rule(ADAMW)}, (0.003, 0.01)), **METHODS}


def with_methods(compared: Compared, name: str, methods: dict[str, Any]) -> Path:
    path = compared.config.parent / name
    path.write_text(yaml.safe_dump(yaml.safe_load(compared.config.read_text()) | {"methods": methods}, sort_keys=False))
    return path


def test_it_is_run_and_no_other_again(compared: Compared, tmp_path: Path) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")}
    hosfl("compare", f"--config={with_methods(compared, 'more.yaml', MORE)}", f"--out={out}")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert [*methods] == [*json.loads((out / "comparison.json").read_text())["rehearsals"]] == [*MORE]
    assert sorted(methods.pop(ADDED)["loss"]["values"]) == ["0", "1"]
    for name, one in methods.items():
        assert one["loss"] == compared.results["methods"][name]["loss"]


def test_one_more_seed_is_run_and_no_other_again(compared: Compared, tmp_path: Path) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*")}
    hosfl("compare", f"--config={compared.config}", f"--out={out}", "--seeds=[0,1,5]")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert {name: [*one["loss"]["values"]] for name, one in methods.items()} == {
        name: [] if name == "wild" else ["0", "1", "5"] for name in METHODS
    }
    assert json.loads((out / "comparison.json").read_text())["settings"]["seeds"] == [0, 1, 5]
    fewer = parse(Comparison, "", [f"--config={compared.config}", f"--out={out}"])
    with pytest.raises(ComparisonError, match="differs in seeds;"):
        Runner(fewer).run()


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({name: MORE[name] for name in MORE if name != "wild"}, r"differs in methods\.wild;"),
        (MORE | {"wild": MORE[ADDED]}, r"differs in methods\.wild\.grid"),
        (
            MORE | {"wild": METHODS["wild"] | {"grid": MORE[ADDED]["grid"]}, "wild.grid": MORE[ADDED]},
            r"methods\.wild\.grid;",
        ),
    ],
    ids=["one is missing", "one is changed", "one is changed and its key is the name of another"],
)
def test_beside_it_all_must_be_as_before(
    compared: Compared, tmp_path: Path, methods: dict[str, Any], words: str
) -> None:
    shutil.copy(compared.out / "comparison.json", tmp_path)
    config = with_methods(compared, "other.yaml", methods)
    with pytest.raises(ComparisonError, match=words):
        Runner(parse(Comparison, "", [f"--config={config}", f"--out={tmp_path}"])).run()


def test_one_that_does_not_start_as_the_others_is_refused_before_it_is_noted(
    compared: Compared, tmp_path: Path
) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")
    known = (out / "comparison.json").read_bytes()
    unlike = MORE[ADDED] | {"overrides": {"model.init_args.lora.server.r": 3}}
    with pytest.raises(SystemExit):
        hosfl("compare", f"--config={with_methods(compared, 'unlike.yaml', MORE | {ADDED: unlike})}", f"--out={out}")
    assert (out / "comparison.json").read_bytes() == known


def test_a_comparison_of_some_methods_is_one_that_more_can_be_added_to(compared: Compared, tmp_path: Path) -> None:
    out = shutil.copytree(compared.out, tmp_path / "out")
    settings = json.loads((out / "comparison.json").read_text())
    some = list(METHODS)[:-1]
    settings["settings"]["methods"].pop("wild")
    settings["rehearsals"].pop("wild")
    settings["settings"]["only"] = some  # as versions before this one wrote
    (out / "comparison.json").write_text(json.dumps(settings))
    hosfl("compare", f"--config={compared.config}", f"--out={out}", f"--only={json.dumps(list(METHODS))}")
    assert [*json.loads((out / "comparison.json").read_text())["rehearsals"]] == [*METHODS]
