from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import all as guard

RATIO = guard.Ratio("some", "a", 1.0, landed=0.8, limit="one pass over memory")


@pytest.fixture
def goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ratios of one module, one of which was never measured."""
    path = tmp_path / "goals.json"
    ratios = [vars(RATIO), vars(guard.Ratio("some", "b", 1.3, at_least=True))]
    path.write_text(json.dumps({"landed": {"date": "2026-01-01", "machine": "m"}, "ratios": ratios}))
    monkeypatch.setattr(guard, "GOALS", path)
    monkeypatch.setattr(guard, "PAGE", tmp_path / "speed.md")
    return path


def gives(monkeypatch: pytest.MonkeyPatch, values: dict[str, float]) -> None:
    monkeypatch.setattr(guard, "measured", lambda module: values)


def test_the_shipped_page_is_of_the_shipped_goals():
    landed, ratios = guard.read()
    assert guard.PAGE.read_text() == guard.page(landed, ratios)


def test_a_goal_that_is_missed_says_why():
    assert all(one.limit for one in guard.read()[1] if one.landed is not None and not one.reached(one.landed))


@pytest.mark.parametrize(("value", "verdict"), [(0.9, "reached"), (0.93, "WORSE"), (1.1, "WORSE")])
def test_what_lost_more_than_noise_is_seen_whatever_the_goal(value: float, verdict: str):
    assert RATIO.verdict(value) == verdict


def test_more_may_be_better():
    speedup = guard.Ratio("some", "b", 1.3, at_least=True, landed=1.5)
    assert [speedup.verdict(value) for value in (1.6, 1.29, 1.31)] == ["reached", "WORSE", "reached"]


@pytest.mark.parametrize(("values", "status", "said"), [
    ({"a": 0.8, "b": 1.4}, 0, "| a | at most 1.00 | 0.800 | 0.800 | reached |"),
    ({"a": 0.95, "b": 1.4}, 1, "worse than landed by more than 1.15 times: a"),
    ({"a": 0.8}, 1, "not measured: b"),
])  # fmt: skip
def test_the_status_says_whether_something_was_lost(goals, monkeypatch, capsys, values, status, said):
    gives(monkeypatch, values)
    assert guard.main(["--quick"]) == status
    assert said in capsys.readouterr().out


def test_what_is_landed_is_what_was_measured(goals, monkeypatch):
    gives(monkeypatch, {"a": 1.2345, "b": 1.4})
    guard.main(["--quick", "--land"])
    landed, ratios = guard.read()
    assert [one.landed for one in ratios] == [1.234, 1.4]
    page = guard.PAGE.read_text()
    assert page == guard.page(landed, ratios)
    assert "- *a*: one pass over memory" in page and "| b | at least 1.30 | 1.40 | reached |" in page


def test_a_module_that_fails_is_named_and_nothing_is_landed(goals, monkeypatch, capsys):
    monkeypatch.setattr(guard, "MEASURE", "raise SystemExit('no such ' + __import__('sys').argv[1])")
    before = goals.read_bytes()
    assert guard.main(["--quick", "--land"]) == 1
    assert "some ... failed: no such some" in capsys.readouterr().err
    assert goals.read_bytes() == before


def test_a_module_measures_on_one_thread_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(
        guard, "MEASURE", "import os, json; print(json.dumps([os.getpid(), os.environ['OMP_NUM_THREADS']]))"
    )
    process, threads = guard.measured("some")
    assert process != os.getpid() and threads == "1"
