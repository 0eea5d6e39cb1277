"""Every ratio that this package is held to: its goal, what was landed, and what it is now.

    python -m benchmarks.all --quick

takes some minutes; it ends with status 1 when a ratio is worse than the landed one by more than ``TOLERANCE``, in a
second measurement too, or when a module fails or does not give a ratio that it should. ``--land`` writes what was
measured into ``benchmarks/goals.json`` and the table of ``docs/results/speed.md``; without ``--quick`` it writes the
table again from the file, where ``limit`` says why a goal is missed. Each module measures in a process of its own, on
one thread, ours and the other in turn; its own ``main`` has the long form.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
GOALS, PAGE = HERE / "goals.json", HERE.parent / "docs" / "results" / "speed.md"
#: By how much two runs of one code differ here at most; of bytes by less.
TOLERANCE = 1.15
#: Seconds that a module may take.
LIMIT = 600
#: What stands between them in the page is written by ``--land``.
BEGIN, END = "<!-- begin: benchmarks.all -->", "<!-- end: benchmarks.all -->"
MEASURE = """
import json, sys, torch
from importlib import import_module
torch.set_num_threads(1)
print(json.dumps(import_module(f"benchmarks.{sys.argv[1]}").quick()))
"""


@dataclass(frozen=True)
class Ratio:
    """One figure.

    Args:
        module: Of this package, whose ``quick`` measures it.
        name: As it is there.
        goal: The bound; None: the ratio is there to explain others.
        at_least: Whether more is better.
        landed: As it was measured last; None: never.
        limit: Why a goal is missed.
        tolerance: A factor that is noise.
    """

    module: str
    name: str
    goal: float | None = None
    at_least: bool = False
    landed: float | None = None
    limit: str = ""
    tolerance: float = TOLERANCE

    def reached(self, value: float) -> bool:
        """Whether the goal is, to the digits that the table shows."""
        if self.goal is None:
            return True
        return round(value, 2) >= self.goal if self.at_least else round(value, 2) <= self.goal

    def verdict(self, value: float) -> str:
        """Of a value, in a word."""
        if self.worse(value):
            return "WORSE"
        return "" if self.goal is None else "reached" if self.reached(value) else "missed"

    def worse(self, value: float) -> bool:
        """Whether it lost more than noise since it was landed, whatever the goal."""
        if self.landed is None:
            return False
        return value * self.tolerance < self.landed if self.at_least else value > self.landed * self.tolerance

    def better(self, one: float, other: float) -> float:
        """Of two measurements."""
        return max(one, other) if self.at_least else min(one, other)

    @property
    def bound(self) -> str:
        """In words."""
        return "–" if self.goal is None else f"{'at least' if self.at_least else 'at most'} {self.goal:.2f}"


def read() -> tuple[dict[str, str], list[Ratio]]:
    """Where and when was landed, and all ratios."""
    held = json.loads(GOALS.read_text())
    return held["landed"], [Ratio(**one) for one in held["ratios"]]


def measured(module: str) -> dict[str, float]:
    """What a module's ``quick`` gives, in a process of its own.

    Raises:
        RuntimeError: It failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, module]
    try:
        done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took more than {LIMIT} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "it died").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def table(ratios: Sequence[Ratio], found: Mapping[str, float]) -> list[str]:
    """Beside their goals."""
    lines = ["| ratio | goal | landed | now | |", "|---|---|---|---|---|"]
    for one in ratios:
        if one.name in found:
            landed = "–" if one.landed is None else f"{one.landed:.3f}"
            value = found[one.name]
            lines.append(f"| {one.name} | {one.bound} | {landed} | {value:.3f} | {one.verdict(value)} |")
    return lines


def page(landed: Mapping[str, str], ratios: Sequence[Ratio]) -> str:
    """What was landed, and why a goal is missed: the page's part between the marks."""
    lines = [
        f"{landed['date']}, {landed['machine']}:", "",
        "| ratio | goal | measured | | `python -m benchmarks.` |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for one in ratios:
        value = "–" if one.landed is None else f"{one.landed:.2f}"
        verdict = "" if one.landed is None else replace(one, landed=None).verdict(one.landed)
        lines.append(f"| {one.name} | {one.bound} | {value} | {verdict} | `{one.module}` |")
    missed = [one for one in ratios if one.landed is not None and not one.reached(one.landed)]
    if missed:
        lines += ["", "Why a goal is missed:", "", *(f"- *{one.name}*: {one.limit}" for one in missed)]
    return "\n".join(lines)


def write_page() -> None:
    """The page's part, from the file."""
    from hosfl_lightning.files import write_whole

    before, _, rest = PAGE.read_text().partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{page(*read())}\n\n{END}{rest.partition(END)[2]}"
    write_whole(PAGE, lambda file: file.write(text.encode()))


def land(ratios: Sequence[Ratio], found: Mapping[str, float]) -> None:
    """Write what was measured, and the page's part."""
    import torch

    from hosfl_lightning.files import write_json
    from hosfl_lightning.run.identity import hardware

    torch.set_num_threads(1)
    landed = {"date": date.today().isoformat(), "machine": hardware(torch.device("cpu"))}
    kept = [replace(one, landed=round(found[one.name], 3)) if one.name in found else one for one in ratios]
    write_json(GOALS, {"landed": landed, "ratios": [asdict(one) for one in kept]}, indent=1)
    write_page()


def measure(modules: Sequence[str], jobs: int) -> tuple[dict[str, float], list[str]]:
    """By ratio what the modules give, so many at a time, and those that gave nothing; each told when it is done."""
    found: dict[str, float] = {}
    failed = []
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        asked = {pool.submit(measured, module): module for module in modules}
        for number, done in enumerate(as_completed(asked), 1):
            said = "done"
            try:
                found |= done.result()
            except RuntimeError as error:
                failed.append(asked[done])
                said = f"failed: {error}"
            seconds = time.monotonic() - began
            print(f"[{number}/{len(modules)}] {seconds:4.0f} s  {asked[done]} {said}", file=sys.stderr, flush=True)
    return found, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and say by the status whether something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure; without it, the commands of the long forms")
    parser.add_argument("--only", nargs="*", metavar="MODULE")
    parser.add_argument("--land", action="store_true", help="keep what was measured as the landed figures")
    parser.add_argument("--jobs", type=int, default=2, help="modules at a time, one core each; 1 is the quietest")
    given = parser.parse_args(arguments)
    ratios = [one for one in read()[1] if one.module in (given.only or [one.module])]
    modules = [*dict.fromkeys(one.module for one in ratios)]
    if not given.quick:
        if given.land:
            write_page()
        print("\n".join(f"python -m benchmarks.{module}" for module in modules))
        return 0
    found, failed = measure(modules, given.jobs)
    if again := [*dict.fromkeys(one.module for one in ratios if one.name in found and one.worse(found[one.name]))]:
        print("worse than landed, so once more:", file=sys.stderr)
        second = measure(again, 1)[0]
        found |= {one.name: one.better(found[one.name], second[one.name]) for one in ratios if one.name in second}
    print("\n".join(table(ratios, found)))
    missing = [one.name for one in ratios if one.name not in found]
    worse = [one.name for one in ratios if one.name in found and one.worse(found[one.name])]
    for name in missing:
        print(f"not measured: {name}")
    for name in worse:
        print(f"worse than landed: {name}")
    if given.land and not failed:
        land(read()[1], found)
    return int(bool(worse or missing))


if __name__ == "__main__":
    sys.exit(main())
