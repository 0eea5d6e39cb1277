"""What is said before the first run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.compare.plan import announced, estimated, left
from hosfl_lightning.compare.runner import Runner
from hosfl_lightning.compare.settings import Comparison, Limits, Method, Tuning
from hosfl_lightning.compare.worker import Rehearsal
from tests.compare.conftest import Compared, hosfl
from tests.compare.tiny import METHODS, write


class Recipe:
    """In the place of the one that a comparison names."""

    absolute = os.devnull


SECONDS = {"start": 10.0, "round": 2.0, "validation": 5.0}


def comparison(
    names: tuple[str, ...] = ("HO-SFL", "frozen", "first order"), points: int = 2, **more: Any
) -> Comparison:
    methods = {name: Method(METHODS[name]["grid"][:points], METHODS[name]["algorithm"]) for name in names}
    return Comparison(**{"out": "o", "recipe": None, "methods": methods, "budget": Limits(rounds=40)} | more)


def rehearsal(**spent: float) -> Rehearsal:
    return Rehearsal(spent or {"samples": 8.0}, [], 8, 8, "Data", dict(SECONDS))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({}, "12 runs: 3 methods x 2 grid points at seed 0, then the chosen point of each x 2 more seeds"),
        ({"tuning": Tuning(seed=7)}, "15 runs: 3 methods x 2 grid points at seed 7, then the chosen point of each x 3 "
         "more seeds"),
        ({"seeds": [0]}, "6 runs: 3 methods x 2 grid points at seed 0"),
        ({"points": 1}, "9 runs: 3 methods x 3 seeds"),
    ],
)  # fmt: skip
def test_the_number_of_runs_is_how_it_comes_about(own: dict[str, Any], words: str) -> None:
    made = comparison(**own)
    assert next(announced(made)) == words
    assert words.startswith(f"{left(made, lambda *run: False).total()} runs:")


def test_without_a_terminal_each_run_of_those_announced_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = comparison(names=("frozen", "first order"), seeds=[0, 1], out=str(tmp_path), recipe=Recipe())
    runner = Runner(made)
    with runner._progress() as advance:
        for point in range(2):
            for name in made.methods:
                advance(runner.job(name, point, 0), None)
        advance(None, None)  # of first order every point has failed
        advance(runner.job("frozen", 1, 0), None)  # again, for the test set
        advance(runner.job("frozen", 1, 1), "it diverged")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["1/6", "2/6", "3/6", "4/6", "frozen"]
    assert lines[1].startswith("2/6 first order {'client_lr': 0.01} seed 0")
    assert lines[4].endswith("seed 1 failed: it diverged")


def test_runs_that_are_made_are_not_left() -> None:
    made = {("HO-SFL", 0, 0), ("HO-SFL", 1, 0), ("HO-SFL", 1, 2), ("frozen", 0, 0)}
    assert left(comparison(), lambda *run: run in made) == {"HO-SFL": 1, "frozen": 3, "first order": 4}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"names": ("HO-SFL", "frozen")}, "methods has no first-order rows; give exactly one of class SplitFedSGD, or "
         "name the row in first_order"),
        ({"names": ("HO-SFL", "first order")}, "methods has no frozen rows; give exactly one of class Frozen"),
        ({"names": ("frozen", "HO-SFL"), "first_order": "first order"}, "first_order: 'first order' is left out; name "
         "it in only"),
        ({"seeds": [3]}, "one seed has no standard error; give at least two seeds"),
    ],
)  # fmt: skip
def test_it_is_said_why_no_gap_will_be_shown(own: dict[str, Any], words: str) -> None:
    _, *warnings = announced(comparison(**own))
    assert warnings == [f"Warning: no gap closed will be shown: {words}"]


def test_of_two_rows_of_a_control_neither_is_it() -> None:
    made = comparison()
    made.methods |= dict.fromkeys(("also frozen",), made.methods["frozen"])
    made.methods["also first order"] = made.methods["first order"]
    _, warning = announced(made)
    assert "methods has 2 frozen rows" in warning and "methods has 2 first-order rows" in warning
    made.first_order = "HO-SFL"
    _, warning = announced(made)
    assert "first-order" not in warning


def test_nothing_is_amiss_with_both_controls_and_two_seeds() -> None:
    assert len([*announced(comparison(seeds=[0, 1]))]) == 1
    assert len([*announced(comparison(("HO-SFL", "frozen"), first_order="HO-SFL"))]) == 1


@pytest.mark.parametrize(
    ("own", "spent", "seconds"),
    [
        ({}, {}, 10 + 40 * 2 + 11 * 5),
        ({"validations": 2}, {}, 10 + 40 * 2 + 3 * 5),
        ({"budget": Limits(samples=81)}, {"samples": 8.0}, 10 + 11 * 2 + 11 * 5),
    ],
)
def test_the_time_is_that_of_the_rehearsed_round(own: dict[str, Any], spent: dict[str, float], seconds: int) -> None:
    made, runs = comparison(**own), left(comparison(), lambda *run: False)
    for jobs in (1, 2):
        made.jobs = jobs
        (words,) = estimated(made, {name: rehearsal(**spent) for name in made.methods}, runs)
        minutes = round(12 * seconds / jobs / 60)
        assert words == f"about {minutes} minutes for 12 runs, {jobs} at a time"


def test_long_times_are_in_hours_and_short_ones_a_minute() -> None:
    made, each = comparison(jobs=1), {name: rehearsal() for name in METHODS}
    runs = left(made, lambda *run: False)
    made.budget = Limits(rounds=1000)
    assert next(estimated(made, each, runs)).startswith("about 6.9 hours for ")
    runs = left(made, lambda name, point, seed: (name, point, seed) != ("frozen", 1, 0))
    made.budget = Limits(rounds=1)
    (words,) = estimated(made, each, runs)
    assert words == "about 1 minute for 1 run, 1 at a time"


def test_nothing_is_said_of_what_is_done_or_was_never_timed() -> None:
    made, each = comparison(), {name: rehearsal() for name in METHODS}
    assert [*estimated(made, each, left(made, lambda *run: True))] == []
    each["frozen"] = Rehearsal({"samples": 8.0}, [], 8, 8, "Data")
    assert [*estimated(made, each, left(made, lambda *run: False))] == []


def test_a_command_says_it_before_its_first_run_and_the_rehearsals_are_timed(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in json.loads((compared.out / "comparison.json").read_text())["rehearsals"].values():
        assert {*one["seconds"]} == {*SECONDS} and min(one["seconds"].values()) > 0
    capsys.readouterr()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_run", stop)
    config = write(tmp_path, methods={"HO-SFL": METHODS["HO-SFL"]}, seeds=[0])
    with pytest.raises(SystemExit):
        hosfl("compare", f"--config={config}", f"--out={tmp_path / 'out'}", "--jobs=1")
    first, warning, rehearsed, time = capsys.readouterr().out.splitlines()
    assert first == "2 runs: 1 method x 2 grid points at seed 0"
    assert "no frozen row" in warning and "no first-order row" in warning
    assert rehearsed.startswith("One round of each of 1 methods")
    assert time == "about 1 minute for 2 runs, 1 at a time"
