"""All runs of a comparison: a few at a time, each at most once, whatever interrupts them."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from math import inf
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import get_loader
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hosfl_lightning.compare import plan, worker
from hosfl_lightning.compare.conditions import CONDITIONS, unequal
from hosfl_lightning.compare.configs import Job, schedule, write_config
from hosfl_lightning.compare.preflight import see_data
from hosfl_lightning.compare.settings import Comparison, ComparisonError
from hosfl_lightning.compare.worker import Rehearsal
from hosfl_lightning.files import write_json

T = TypeVar("T")
#: Not part of what a comparison is; which methods `only` left is in them.
PLACES = ("out", "jobs", "wandb", "catalogue", "only")


class Runner:
    """Runs a comparison; started again in the same folder it goes on, also with more methods or more seeds.

    Args:
        comparison: Checked.

    Raises:
        ComparisonError: The folder holds another comparison, or another process works on it.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.out = comparison, Path(comparison.out).absolute()
        recipe: Any = comparison.recipe
        self.base: dict[str, Any] = get_loader("yaml")(Path(recipe.absolute).read_text())
        self.plans: dict[str, tuple[int, int]] = {}

    def run(self) -> dict[str, int | None]:
        """Everything; the number of the point chosen for each method, None where all points failed.

        Raises:
            ComparisonError: A recipe is refused, or the methods do not meet equal conditions.
        """
        with self._lock(), self._tidy(), self._pool() as each:
            known = self._known()
            _say(plan.announced(self.comparison))
            rehearsals = self._rehearse(each, known)
            left = plan.left(self.comparison, lambda *run: _done(self.job(*run), False))
            _say(plan.estimated(self.comparison, rehearsals, left))
            self.plans = {name: schedule(self.comparison, one.spent) for name, one in rehearsals.items()}
            tuning, methods = self.comparison.tuning, self.comparison.methods
            points = range(self.comparison.grid_size)
            trials = [self.job(name, p, tuning.seed) for p in points for name in methods] if len(points) > 1 else []
            with self._progress() as advance:
                self._run(each, trials, False, advance)
                chosen = {name: self.choose(name) for name in methods}
                found = [(name, point) for name, point in chosen.items() if point is not None]
                for _ in range((len(methods) - len(found)) * len(plan.further_seeds(self.comparison))):
                    advance(None, None)
                final = [self.job(name, point, seed) for seed in self.comparison.seeds for name, point in found]
                self._run(each, final, bool(next(iter(rehearsals.values())).test), advance)
        return chosen

    def job(self, method: str, point: int, seed: int) -> Job:
        """A run by what tells it from the others."""
        return Job(method, point, seed, str(self.out / "runs"))

    def choose(self, method: str) -> int | None:
        """The point whose run ended best at the tuning seed, of equals the first; None where all failed."""
        scores = [self.score(method, point) for point in range(self.comparison.grid_size)]
        return 0 if len(scores) == 1 else None if min(scores) == inf else scores.index(min(scores))

    def score(self, method: str, point: int) -> float:
        """What a trial ended with; lower is better, and a failure is infinite."""
        value = self.trial(self.job(method, point, self.comparison.tuning.seed))
        sign = 1 if self.comparison.tuning.mode == "min" else -1
        return inf if value is None else sign * value

    def trial(self, job: Job) -> float | None:
        """The tuning metric at the end of a run; None if it failed."""
        if not (job.folder / CONDITIONS).is_file():
            return None
        summary = json.loads((job.folder / "summary.json").read_text())
        value: float | None = summary["metrics_last"][self.comparison.tuning.metric]  # null: it was no number
        return value

    # ---- before the first run

    def _known(self) -> dict[str, Rehearsal]:
        """The rehearsals of a comparison that was begun here; none if there was none."""
        path = self.out / "comparison.json"
        if not path.is_file():
            return {}
        theirs, mine = json.loads(path.read_text()), self._settings()
        mine["methods"] = {name: one for name, one in mine["methods"].items() if name in theirs["settings"]["methods"]}
        before, added = theirs["settings"]["seeds"], {}
        if {*before} < {*mine["seeds"]}:  # one that was run may not be left out for what it gave
            added = {"seeds": mine["seeds"]}
        names = [*_differences(theirs["settings"] | {"only": None} | added, mine)]
        if names:
            raise ComparisonError(
                f"out: {self.comparison.out} holds another comparison, which differs in {', '.join(names[:5])}; "
                "give another folder"
            )
        if added:
            write_json(path, theirs | {"settings": theirs["settings"] | added}, indent=2)
        return {name: Rehearsal(**one) for name, one in theirs["rehearsals"].items()}

    def _settings(self) -> dict[str, Any]:
        """What a comparison that goes on must agree on."""
        settings = {name: value for name, value in asdict(self.comparison).items() if name not in PLACES}
        return json.loads(json.dumps(settings | {"recipe": self.base}))

    def _rehearse(
        self, each: Callable[..., Iterator[tuple[Any, Any]]], known: dict[str, Rehearsal]
    ) -> dict[str, Rehearsal]:
        """One round of every method, so that what is refused is refused before the first run.

        Of those known one is enough, to see that the new ones start as it does.
        """
        new = [name for name in self.comparison.methods if name not in known]
        if not new:
            return known
        root, seed = self.out / "rehearsal", self.comparison.tuning.seed
        tasks: dict[str, tuple[list[Job]]] = {}
        for name in [*[*known][:1], *new]:
            jobs = [Job(name, point, seed, str(root)) for point in range(len(self.comparison.methods[name].grid))]
            for job in jobs:
                write_config(job, self.comparison, self.base, 1, 1)
            tasks[name] = (jobs,)
        for _, said in each(see_data, {"data": (next(iter(tasks.values()))[0][0],)}):
            print("".join(f"Seed {seed}: {line}\n" for line in said), end="", flush=True)
        print(f"One round of each of {len(tasks)} methods, to see that all can run", flush=True)
        found = known | dict(each(worker.rehearse, tasks))
        rehearsals = {name: found[name] for name in self.comparison.methods}
        self.check(rehearsals)
        _see_equal(jobs[0] for (jobs,) in tasks.values())
        content = {"settings": self._settings(), "rehearsals": {name: asdict(one) for name, one in rehearsals.items()}}
        write_json(self.out / "comparison.json", content, indent=2)
        shutil.rmtree(root)
        return rehearsals

    def check(self, rehearsals: dict[str, Rehearsal]) -> None:
        """Refuse what cannot be known before model and data are.

        Raises:
            ComparisonError: Names the setting and the fix.
        """
        comparison = self.comparison
        for name, one in rehearsals.items():
            if comparison.grid_size > 1 and not (one.validation and one.test):
                missing = "test" if one.validation else "validation"
                raise ComparisonError(
                    f"methods: a grid of {comparison.grid_size} points is chosen from on a validation set and judged "
                    f"on a test set, but the data has no {missing} set: set it for {one.data}, or give one point each"
                )
            wanted = {"tuning.metric": comparison.tuning.metric}
            wanted |= {"metric": f"val/{comparison.metric}"} if comparison.metric else {}
            wanted |= {"target.metric": f"val/{comparison.target.metric}"} if comparison.target else {}
            for setting, metric in wanted.items():
                if metric not in one.metrics:
                    raise ComparisonError(f"{setting}: {name} logs no {metric}; it logs {', '.join(one.metrics)}")
            if comparison.budget.rounds is None and not one.spent[comparison.budget.kind]:
                raise ComparisonError(f"budget.{comparison.budget.kind}: {name} spends none; take another budget")

    # ---- running

    def _run(self, each: Callable[..., Iterator[Any]], jobs: Sequence[Job], test: bool, advance: Any) -> None:
        done = [job for job in jobs if _done(job, test)]
        for job in done:
            advance(job, None)
        left = [job for job in jobs if job not in done]
        for job in left:
            write_config(job, self.comparison, self.base, *self.plans[job.method])
        _see_equal(done)
        for job, failure in each(worker.run, {job: (job, test) for job in left}):
            _see_equal([job, *done])
            done.append(job)
            advance(job, failure)

    @contextmanager
    def _pool(self) -> Iterator[Callable[..., Iterator[tuple[Any, Any]]]]:
        """A function that calls another in the workers and yields what comes back, in whatever order."""
        reader, writer = Pipe(duplex=False)
        workers = ProcessPoolExecutor(self.comparison.jobs, get_context("spawn"), worker.begin, (reader,))

        def each(function: Callable[..., T], tasks: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, T]]:
            futures = {workers.submit(function, *args): key for key, args in tasks.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()

        again = "the same command goes on where it stopped"
        try:
            yield each
        except KeyboardInterrupt:
            writer.close()  # which ends the workers
            raise KeyboardInterrupt(f"interrupted; {again}") from None
        except BrokenProcessPool:
            raise ComparisonError(
                f"a worker process died, maybe for want of memory (--jobs=1 needs less); {again}"
            ) from None
        except BaseException:
            writer.close()
            raise
        finally:
            workers.shutdown(cancel_futures=True)
            writer.close()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ComparisonError(f"out: another process compares in {self.comparison.out}") from None
            yield

    @contextmanager
    def _tidy(self) -> Iterator[None]:
        """Of a comparison that is refused no rehearsal stays behind."""
        try:
            yield
        except (ComparisonError, KeyboardInterrupt):
            shutil.rmtree(self.out / "rehearsal", ignore_errors=True)
            raise

    @contextmanager
    def _progress(self) -> Iterator[Callable[[Job | None, str | None], None]]:
        """One bar over all runs, each counted once; where standard error is no terminal a line for each that ends."""
        bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console, total, counted = Console(stderr=True), plan.total(self.comparison), set[Job]()
        with Progress(*bar, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("runs", total=total)

            def advance(job: Job | None, failure: str | None) -> None:
                new = job is None or job not in counted  # a chosen trial comes again, for the test set
                progress.advance(task, int(new))
                if job is None:
                    return
                counted.add(job)
                said = f"{job.method} {self.comparison.methods[job.method].grid[job.point]} seed {job.seed}"
                if failure is not None:
                    console.print(f"{said} failed: {failure}", markup=False, highlight=False, soft_wrap=True)
                elif new and not console.is_terminal:
                    done = f"{progress.tasks[0].completed:.0f}/{total}"
                    console.print(f"{done} {said}", markup=False, highlight=False, soft_wrap=True)

            yield advance


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


def _see_equal(jobs: Iterable[Job]) -> None:
    """Stop where runs of one seed had another start, other examples or another order of them."""
    difference = unequal((job.method, job.seed, job.folder) for job in jobs)
    if difference:
        raise ComparisonError(f"{difference}, so they cannot be compared: set what both need in overrides")


def _done(job: Job, test: bool) -> bool:
    return job.failed.is_file() or (job.folder / (worker.TEST if test else CONDITIONS)).is_file()


def _differences(theirs: Any, mine: Any, name: str = "") -> Iterator[str]:
    """The dotted names of what is not equal."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in theirs | mine:
            yield from _differences(theirs.get(key), mine.get(key), f"{name}.{key}" if name else key)
    elif theirs != mine:
        yield name
