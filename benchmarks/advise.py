"""Whether ``hosfl advise`` is right: its ranking of clients against what they gained in whole runs.

    python -m benchmarks.advise --data DATA --out docs/results/advise

What was measured is the JSON of ``benchmarks.client_learning``; with ``--of input_shift --weights DIR`` that of
``benchmarks.input_shift``, whose pretrained weights lie in DIR. In every cell that is in it and whose data is there the
advisor tries the rows' own clients at seed 0, each with one learning rate, not the chosen one but the middle of its
grid, beside one server. Then Kendall's τ over the rows of a cell and over cells, with an interval of a bootstrap over
cells and, within, seeds; and how often the choice is within the interval of the best row. A cell takes a minute or
two; one that is in OUT already is not measured again. On the cells in `TUNED` the rule's numbers were chosen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from benchmarks.advise_agreement import FREEZE, Cell, Row, report
from hosfl_lightning import recipe
from hosfl_lightning.advise.candidates import Candidate
from hosfl_lightning.advise.command import BATCHES, ROUNDS, Advisor, as_written
from hosfl_lightning.advise.measurement import measure
from hosfl_lightning.advise.ranking import choose
from hosfl_lightning.compare.configs import Job, write_config
from hosfl_lightning.compare.settings import SHORT, Comparison
from hosfl_lightning.files import write_json, write_whole

FROZEN = "frozen"
#: Looked at while the rule's numbers were chosen; all others are reported.
TUNED = ("digits_cut3_strong_8clients_iid", "digits_cut3_weak_8clients_iid", "digits_cut2_strong_8clients_iid")


class Build(recipe.HOSFLCommand):
    """Builds trainer, model and data of a recipe, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def tried(method: Mapping[str, Any]) -> bool:
    """Whether the advisor has such a candidate: no personal half, no part of a gradient, no callback, none twice."""
    init = method["algorithm"].get("init_args", {})
    partial = not init.get("compression", {}).get("class_path", "Uncompressed").endswith("Uncompressed")
    other = init.get("personal") or init.get("checkpointing") or "trainer.callbacks" in method["overrides"]
    return not (partial or other)


def rate(one: Mapping[str, Any], name: str) -> float | None:
    """A learning rate of a grid's point, by its short name or the recipe's."""
    return one.get(name, one.get(SHORT[name]))


def point(grid: Sequence[Mapping[str, Any]], server: float | None) -> int:
    """The number of the lower middle one of a grid's client rates, beside that server's."""
    near = [n for n, one in enumerate(grid) if server is None or rate(one, "server_lr") == server]
    ordered = sorted(near, key=lambda n: rate(grid[n], "client_lr") or 0.0)
    return ordered[(len(ordered) - 1) // 2]


def common_server(comparison: Comparison) -> float | None:
    """The highest server's rate that every row has tried; None: the rows set none."""
    each = [{rate(one, "server_lr") for one in method.grid} - {None} for method in comparison.methods.values()]
    both = {one for one in set.intersection(*each) if one is not None}
    return max(both, default=None)


def built(comparison: Comparison, name: str, server: float | None, out: Path) -> Any:
    """Trainer, model and data of a row."""
    job = Job(name, point(comparison.methods[name].grid, server), 0, str(out))
    base = yaml.safe_load(Path(comparison.recipe).read_text())
    write_config(job, comparison, base, comparison.budget.rounds or 1, 1000)
    return recipe.command(["fit", f"--config={job.config}", "--trainer.logger=false"], Build, Advisor)


def candidate(name: str, own: Any) -> Candidate:
    """A row's client, as the advisor tries it."""
    model = own.model
    return Candidate(name, lambda: model, own.trainer.algorithm, own.trainer.settings.codec.gradient)


def advised(comparison: Comparison, rows: Sequence[str]) -> dict[str, Any]:
    """What the advisor says of a cell."""
    with tempfile.TemporaryDirectory() as folder:
        out, server = Path(folder), common_server(comparison)
        still = built(comparison, FROZEN, server, out)
        known = [candidate(name, built(comparison, name, server, out)) for name in rows]
        trainer: Any = still.trainer
        rounds = min(ROUNDS, trainer.settings.max_rounds)
        found = measure(trainer, still.model, still.datamodule, known, rounds, BATCHES)
    return as_written(found, choose(found.findings))


def of_cell(cell: Any, row: Mapping[str, Any]) -> bool:
    """Whether a row of the results is that cell's."""
    if "cell" in row:
        return bool(row["cell"] == cell.name)
    parted = (cell.partition.get("data.init_args.partition", "iid"), cell.partition.get("data.init_args.alpha"))
    mine = (cell.task, cell.cut, cell.server, cell.clients, *parted)
    return mine == tuple(row[key] for key in ("task", "cut", "server", "clients", "partition", "alpha"))


def joined(cell: Any, advice: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Cell:
    """What was advised beside what was measured, at the seeds that all rows have."""
    measured = {row["method"]: row["loss"]["values"] for row in rows if of_cell(cell, row)}
    predicted = {one["name"]: one for one in advice["findings"] if one["gain"] is not None}
    names = [name for name in measured if name in predicted]
    seeds = sorted(set.intersection(*(set(measured[name]) for name in (FROZEN, *names))))
    gained = {n: tuple(measured[FROZEN][s] - measured[n][s] for s in seeds) for n in (FROZEN, *names)}
    found = [Row(n, predicted[n]["gain"][0], gained[n], predicted[n]["backprop"]) for n in names]
    share = max(one["share"][0] for one in advice["findings"])
    return Cell(cell.name, (Row(FREEZE, 0.0, gained[FROZEN]), *found), advice["choice"], share)


def lacking(cell: Any, module: Any) -> bool:
    """Whether a cell needs a folder that no option names; such are left out unless asked for."""
    return "{minilm}" in json.dumps(module.TASKS[cell.task].overrides)


def main(args: Sequence[str] | None = None) -> None:
    """Advise on each cell, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default="client_learning", help="client_learning or input_shift")
    parser.add_argument("--results", type=Path, help="its JSON; docs/results/OF/OF.json unless given")
    parser.add_argument("--data", required=True, help="folder with a folder a data set")
    parser.add_argument("--minilm", default="", help="folder of all-MiniLM-L6-v2; else cells that need it are left out")
    parser.add_argument("--weights", default="", help="folder of the pretrained weights of input_shift")
    parser.add_argument("--cells", nargs="+", help="all that are in RESULTS unless given")
    parser.add_argument("--out", type=Path, required=True, help="folder of advise_OF.json and advise_OF.md")
    own = parser.parse_args(args)
    module = import_module(f"benchmarks.{own.of}")
    rows = json.loads((own.results or Path(f"docs/results/{own.of}/{own.of}.json")).read_text())["rows"]
    places = {"data": own.data, "minilm": own.minilm, "weights": own.weights}
    path = own.out / f"advise_{own.of}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for cell in module.CELLS:
        measured = {row["method"]: row for row in rows if of_cell(cell, row)}
        if not measured or (own.cells and cell.name not in own.cells) or (not own.minilm and lacking(cell, module)):
            continue
        if cell.name not in known:
            with tempfile.TemporaryDirectory() as folder:
                comparison = module.comparison(cell, places, Path(folder))
            methods = comparison.methods
            names = [n for n in measured if n != FROZEN and n in methods and tried(vars(methods[n]))]
            print(f"{cell.name}: {', '.join(names)}", flush=True)
            known[cell.name] = advised(comparison, names)
            write_json(path, known, indent=1)
    cells = [joined(cell, known[cell.name], rows) for cell in module.CELLS if cell.name in known]
    text = report(cells, TUNED)
    write_whole(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()
