"""What a comparison is going to take and cannot show, said before its first run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from hosfl_lightning.compare.configs import schedule
from hosfl_lightning.compare.results import FIRST_ORDER, FROZEN
from hosfl_lightning.compare.settings import Comparison, Method
from hosfl_lightning.compare.worker import Rehearsal


def announced(comparison: Comparison) -> Iterator[str]:
    """How many runs there are, then what is amiss with the controls."""
    methods, points, seeds = len(comparison.methods), comparison.grid_size, len(further_seeds(comparison))
    parts = [f"{_many(methods, 'method')} x {_many(seeds, 'seed')}"]
    if points > 1:
        parts = [f"{_many(methods, 'method')} x {points} grid points at seed {comparison.tuning.seed}"]
        parts += [f"then the chosen point of each x {_many(seeds, 'more seed')}"] if seeds else []
    yield f"{_many(total(comparison), 'run')}: {', '.join(parts)}"
    if lacking := [*_lacking(comparison)]:
        yield f"Warning: no gap closed will be shown: {'; '.join(lacking)}"


def total(comparison: Comparison) -> int:
    """How many runs there are, each counted once."""
    trials = comparison.grid_size if comparison.grid_size > 1 else 0
    return len(comparison.methods) * (trials + len(further_seeds(comparison)))


def _lacking(comparison: Comparison) -> Iterator[str]:
    """What `results` would find missing for ``gap_closed``, and the fix."""
    kinds = {name: _kind(method) for name, method in comparison.methods.items()}
    if (count := [*kinds.values()].count(FROZEN)) != 1:
        yield f"methods has {_many(count, 'frozen row')}; give exactly one of class {FROZEN}"
    if comparison.first_order is not None:
        if comparison.first_order not in kinds:
            yield f"first_order: {comparison.first_order!r} is left out; name it in only"
    elif (count := [*kinds.values()].count(FIRST_ORDER)) != 1:
        yield (
            f"methods has {_many(count, 'first-order row')}; give exactly one of class {FIRST_ORDER}, "
            "or name the row in first_order"
        )
    if len(comparison.seeds) < 2:
        yield "one seed has no standard error; give at least two seeds"


def _kind(method: Method) -> str:
    assert method.algorithm is not None
    return method.algorithm["class_path"].rpartition(".")[2]


def left(comparison: Comparison, done: Callable[[str, int, int], bool]) -> Counter[str]:
    """Runs of each method that are still to be made.

    Args:
        comparison: Checked.
        done: Whether a method's run at a point and a seed is.
    """
    points, runs = range(comparison.grid_size), Counter[str]()
    for name in comparison.methods:
        if len(points) > 1:
            runs[name] += sum(not done(name, point, comparison.tuning.seed) for point in points)
        runs[name] += sum(not any(done(name, point, seed) for point in points) for seed in further_seeds(comparison))
    return runs


def estimated(comparison: Comparison, rehearsals: Mapping[str, Rehearsal], runs: Counter[str]) -> Iterator[str]:
    """How long those runs take; nothing is said of a comparison that is done, or whose rehearsals were not timed."""
    timed = {name: rehearsals[name].seconds for name, count in runs.items() if count}
    if not timed or not all(timed.values()):
        return
    seconds = sum(runs[name] * _seconds(comparison, rehearsals[name]) for name in timed) / comparison.jobs
    minutes = max(1, round(seconds / 60))
    span = _many(minutes, "minute") if minutes <= 120 else f"{minutes / 60:.1f} hours"
    yield f"about {span} for {_many(runs.total(), 'run')}, {comparison.jobs} at a time"


def _seconds(comparison: Comparison, rehearsal: Rehearsal) -> float:
    """``start + rounds · round + validations · validation`` of one run, by the one round that was rehearsed."""
    rounds, _ = schedule(comparison, rehearsal.spent, slack=1)
    one = rehearsal.seconds
    return one["start"] + rounds * one["round"] + (comparison.validations + 1) * one["validation"]


def further_seeds(comparison: Comparison) -> list[int]:
    """Those that are run beside the trials."""
    return [seed for seed in comparison.seeds if comparison.grid_size == 1 or seed != comparison.tuning.seed]


def _many(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
