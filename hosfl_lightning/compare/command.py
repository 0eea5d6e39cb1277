"""``hosfl compare`` and ``hosfl report``."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from jsonargparse import get_loader

from hosfl_lightning import recipe
from hosfl_lightning.compare import report as reports
from hosfl_lightning.compare.conditions import unequal
from hosfl_lightning.compare.pictures import draw
from hosfl_lightning.compare.publish import publish
from hosfl_lightning.compare.results import reckon
from hosfl_lightning.compare.runner import Runner
from hosfl_lightning.compare.runs import Group, Run
from hosfl_lightning.compare.settings import (
    SHORT,
    Comparison,
    ComparisonError,
    Limits,
    Method,
    Publish,
    Target,
    Tuning,
    flat,
)
from hosfl_lightning.compare.table import markdown
from hosfl_lightning.files import write_json, write_whole
from hosfl_lightning.rendering import listed

#: Settings that have settings.
PARTS: dict[str, type] = {"budget": Limits, "tuning": Tuning, "target": Target, "wandb": Publish}


@dataclass
class Report:
    """The tables and pictures of run folders that are there.

    Args:
        runs: Folders of finished runs, of ``hosfl compare`` or ``hosfl fit``.
        out: The folder of the results.
        metric: As of a comparison.
        mode: As of a comparison.
        target: As of a comparison.
        wandb: As of a comparison.
    """

    runs: list[str]
    out: str
    metric: str | None = None
    mode: Literal["min", "max"] = "max"
    target: Target | None = None
    wandb: Publish | None = None


def main(args: list[str]) -> None:
    """``hosfl compare --config RECIPE --out DIR`` or ``hosfl report --runs A B --out DIR``."""
    command = f"hosfl {shlex.join(args)}"
    name, *rest = args
    if name == "compare":
        compare(parse(Comparison, "hosfl compare", rest), command)
    else:
        report(parse(Report, "hosfl report", _as_list(rest, "--runs")), command)


def compare(comparison: Comparison, command: str) -> dict[str, Any]:
    """Run what is not run yet, then write the results."""
    comparison.check()
    runner = Runner(comparison)
    chosen = runner.run()
    groups = [_group(runner, name, point) for name, point in chosen.items()]
    results = reckon(groups, comparison.metric, comparison.mode, comparison.target, command, comparison.first_order)
    budget, points = comparison.budget, comparison.grid_size
    results["budget"] = {budget.kind: budget.value}
    results["notes"] = [
        *untuned(comparison),
        f"Every run may spend {budget.value:,} {budget.kind}; seeds {', '.join(map(str, comparison.seeds))}; "
        f"{points} grid point(s) a method"
        + (f", chosen by {comparison.tuning.metric} at seed {comparison.tuning.seed}" if points > 1 else ""),
    ]
    write(results, Path(comparison.out), comparison.wandb)
    return results


def report(settings: Report, command: str) -> dict[str, Any]:
    """The same from run folders."""
    groups = reports.group(settings.runs)
    results = reckon(groups, settings.metric, settings.mode, settings.target, command)
    difference = unequal((one.name, seed, run.folder) for one in groups for seed, run in one.runs.items())
    results["notes"] = reports.notes(groups) + ([f"**Not equal conditions**: {difference}"] if difference else [])
    write(results, Path(settings.out), settings.wandb)
    return results


def write(results: dict[str, Any], out: Path, wandb: Publish | None) -> None:
    """``results.json``, ``table.md`` and the pictures, then W&B."""
    write_json(out / "results.json", results, indent=2)
    write_whole(out / "table.md", lambda file: file.write(markdown(results).encode()))
    pictures = draw(results, out)
    if wandb is not None:
        publish(results, pictures, wandb, out)
    print(markdown(results))
    print(f"results.json, table.md, {', '.join(path.name for path in pictures.values())} in {out}")


def _group(runner: Runner, name: str, point: int | None) -> Group:
    """A method's runs at its chosen point, and what its other points came to."""
    comparison = runner.comparison
    grid, tuning = comparison.methods[name].grid, comparison.tuning.seed
    trials = [runner.job(name, number, tuning) for number in range(len(grid))] if len(grid) > 1 else []
    failures = {job: reason for job in trials if (reason := _reason(job.failed))}
    details = {
        "point": None if point is None else grid[point],
        "edge": point is not None and at_edge(grid, point),
        "trials": [{"point": grid[job.point], comparison.tuning.metric: runner.trial(job)} for job in trials],
        "failed_points": [{"point": grid[job.point], "reason": reason} for job, reason in failures.items()],
    }
    jobs = [] if point is None else [runner.job(name, point, seed) for seed in comparison.seeds]
    failed = {job.seed: reason for job in jobs if (reason := _reason(job.failed))}
    return Group(name, {job.seed: Run(job.folder) for job in jobs if job.seed not in failed}, failed, details)


def at_edge(grid: list[dict[str, Any]], point: int) -> bool:
    """Whether a number of the chosen point is the lowest or the highest of more than two that the grid has for it."""
    for key, value in grid[point].items():
        tried = {one.get(key) for one in grid}
        numbers = sorted(one for one in tried if isinstance(one, int | float))
        if len(numbers) > 2 and value in (numbers[0], numbers[-1]):
            return True
    return False


def untuned(comparison: Comparison) -> list[str]:
    """A note where a method tried a server's learning rate that another did not, which can pass for a client's gain.

    A method whose client has no learning rate, as the frozen control, may have tried more of them.
    """
    client, server = SHORT["client_lr"], SHORT["server_lr"]
    tried, wanted = {}, set()
    for name, method in comparison.methods.items():
        if not trains_a_server(method):
            continue
        points = [flat(method.overrides) | flat(point) for point in method.grid]
        tried[name] = {str(point.get(server, "the recipe's")) for point in points}
        wanted |= tried[name] if any(client in point for point in points) else set()
    if all(wanted <= values for values in tried.values()):
        return []
    shown = "; ".join(f"{listed([name])}: {', '.join(sorted(values))}" for name, values in tried.items())
    return [f"**Unequally tuned servers** ({shown}): a server's learning rate can pass for a client's gain, or hide it"]


def trains_a_server(method: Method) -> bool:
    """Whether the server's optimizer has a part in it."""
    assert method.algorithm is not None
    module, _, name = method.algorithm["class_path"].rpartition(".")
    return getattr(import_module(module or "hosfl_lightning.algorithms"), name).server_order == "first"


def _reason(failed: Path) -> str:
    return json.loads(failed.read_text())["reason"] if failed.is_file() else ""


def parse(settings: type, prog: str, args: list[str]) -> Any:
    """The settings that a command line gives, a `Comparison` or a `Report`."""
    parser = recipe.Parser(prog=prog, description=(settings.__doc__ or "").splitlines()[0])
    parser.add_argument("-c", "--config", action="config", help="A YAML file with these settings.")
    parser.add_class_arguments(settings)
    args, overrides = _dotted(args, "--overrides.") if settings is Comparison else (args, {})
    recipe.Parser.files = recipe.read_files(args)
    config = parser.parse_args(args)
    # Plain, not instantiated: the classes that it names are those of the runs.
    values = json.loads(parser.dump(config, skip_unset=False, format="json"))
    given = {field.name: values[field.name] for field in fields(settings)}
    if kinds := re.findall(r"^--budget\.(\w+)", "\n".join(args), flags=re.MULTILINE):
        given["budget"] = {kinds[-1]: given["budget"][kinds[-1]]}  # the file's may be of another kind
    for name, part in PARTS.items():
        if given.get(name) is not None:
            given[name] = part(**given[name])
    if settings is Comparison:
        methods = {name: Method(**one) for name, one in given["methods"].items()}
        given |= {"recipe": config.recipe, "methods": methods, "overrides": flat(given["overrides"]) | overrides}
        comparison, catalogue = Comparison(**given), config.catalogue
        comparison.look_up(get_loader("yaml")(Path(catalogue.absolute).read_text()) if catalogue else {})
        return comparison
    return settings(**given)


def _dotted(args: list[str], prefix: str) -> tuple[list[str], dict[str, Any]]:
    """The other arguments, and those of ``--overrides.a.b=1`` as ``{"a.b": 1}``.

    The parser would take ``a`` for a key of the dict, and of two arguments below one ``a`` it would keep the last.

    Raises:
        ComparisonError: One of them has no value.
    """
    rest, found, left = list[str](), dict[str, Any](), iter(args)
    for arg in left:
        if not arg.startswith(prefix):
            rest.append(arg)
            continue
        key, equals, value = arg.removeprefix(prefix).partition("=")
        value = value if equals else next(left, "--")
        if not equals and value.startswith("--"):
            raise ComparisonError(f"{arg}: a value is missing; give {arg}=VALUE")
        found[key] = get_loader("yaml")(value)
    return rest, found


def _as_list(args: list[str], option: str) -> list[str]:
    """``--runs A B`` as ``--runs=["A", "B"]``, which is how the parser takes a list."""
    if option not in args:
        return args
    start = args.index(option) + 1
    end = next((n for n, arg in enumerate(args[start:], start) if arg.startswith("--")), len(args))
    return [*args[: start - 1], f"{option}={json.dumps(args[start:end])}", *args[end:]]
