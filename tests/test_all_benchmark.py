"""`benchmarks.all` sees what got slower, whatever else fails, and the page of speed is what was landed."""

from __future__ import annotations

import json
import os
import threading
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
    guard.PAGE.write_text(f"Above.\n{guard.BEGIN}\nold\n{guard.END}\nBelow.\n")
    return path


def gives(monkeypatch: pytest.MonkeyPatch, *values: dict[str, float]) -> list[str]:
    """One after the other, the last for good; the modules that were asked."""
    left, asked = list(values), list[str]()

    def measured(module: str) -> dict[str, float]:
        asked.append(module)
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(guard, "measured", measured)
    return asked


def test_the_shipped_page_is_of_the_shipped_goals() -> None:
    assert f"{guard.BEGIN}\n\n{guard.page(*guard.read())}\n\n{guard.END}" in guard.PAGE.read_text()


def test_a_goal_that_is_missed_says_why() -> None:
    assert all(one.limit for one in guard.read()[1] if one.landed is not None and not one.reached(one.landed))


def test_names_are_told_apart() -> None:
    names = [one.name for one in guard.read()[1]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("value", "verdict"), [(0.9, "reached"), (0.93, "WORSE"), (1.1, "WORSE")])
def test_what_lost_more_than_noise_is_seen_whatever_the_goal(value: float, verdict: str) -> None:
    assert RATIO.verdict(value) == verdict


def test_what_has_no_goal_is_only_compared() -> None:
    explains = guard.Ratio("some", "c", landed=1.0, tolerance=1.02)
    assert [explains.verdict(value) for value in (1.01, 1.03)] == ["", "WORSE"]
    assert explains.reached(9.0)


def test_more_may_be_better() -> None:
    speedup = guard.Ratio("some", "b", 1.3, at_least=True, landed=1.5)
    assert [speedup.verdict(value) for value in (1.6, 1.29, 1.31)] == ["reached", "WORSE", "reached"]


@pytest.mark.parametrize(("values", "status", "said"), [
    ({"a": 0.8, "b": 1.4}, 0, "| a | at most 1.00 | 0.800 | 0.800 | reached |"),
    ({"a": 0.95, "b": 1.4}, 1, "worse than landed: a"),
    ({"a": 0.8}, 1, "not measured: b"),
])  # fmt: skip
def test_the_status_says_whether_something_was_lost(
    goals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    values: dict[str, float], status: int, said: str,
) -> None:  # fmt: skip
    gives(monkeypatch, values)
    assert guard.main(["--quick"]) == status
    assert said in capsys.readouterr().out


def test_what_is_worse_once_is_measured_again(goals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gives(monkeypatch, {"a": 0.95, "b": 1.4}, {"a": 0.81, "b": 1.2})
    assert guard.main(["--quick"]) == 0
    assert asked == ["some", "some"]


def test_what_is_landed_is_what_was_measured(goals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gives(monkeypatch, {"a": 1.2345, "b": 1.4})
    guard.main(["--quick", "--land"])
    landed, ratios = guard.read()
    assert [one.landed for one in ratios] == [1.234, 1.4]
    text = guard.PAGE.read_text()
    assert text == f"Above.\n{guard.BEGIN}\n\n{guard.page(landed, ratios)}\n\n{guard.END}\nBelow.\n"
    assert "- *a*: one pass over memory" in text and "| b | at least 1.30 | 1.40 | reached | `some` |" in text


def test_the_page_is_written_again_without_measuring(goals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gives(monkeypatch, {})
    assert guard.main(["--land"]) == 0
    assert asked == [] and "| a | at most 1.00 | 0.80 | reached | `some` |" in guard.PAGE.read_text()


def test_a_module_that_fails_is_named_and_nothing_is_landed(
    goals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "MEASURE", "raise SystemExit('no such ' + __import__('sys').argv[1])")
    before = goals.read_bytes()
    assert guard.main(["--quick", "--land"]) == 1
    assert "some failed: no such some" in capsys.readouterr().err
    assert goals.read_bytes() == before


def test_two_modules_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=10)

    def measured(module: str) -> dict[str, float]:
        both.wait()
        return {module: 1.0}

    monkeypatch.setattr(guard, "measured", measured)
    assert guard.measure(["a", "b"], 2) == ({"a": 1.0, "b": 1.0}, [])


def test_a_module_measures_on_one_thread_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(
        guard, "MEASURE", "import os, json; print(json.dumps([os.getpid(), os.environ['OMP_NUM_THREADS']]))"
    )
    process, threads = guard.measured("some")
    assert process != os.getpid() and threads == "1"
