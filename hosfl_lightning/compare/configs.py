"""One run of a comparison: its recipe, and where it lies."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import yaml

from hosfl_lightning.compare.settings import Comparison, flat
from hosfl_lightning.files import write_whole

#: A run that has a budget other than rounds ends by it; this many times the rounds that the first one foretells.
SLACK = 10


@dataclass(frozen=True)
class Job:
    """One run: a method at a point of its grid, under one seed.

    Args:
        method: Its name.
        point: Number of the grid point.
        seed: Of data, model and run.
        root: The folder ``runs`` of the comparison.
    """

    method: str
    point: int
    seed: int
    root: str

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.root) / self.method / f"{self.point}-seed{self.seed}"

    @property
    def config(self) -> Path:
        """Its recipe, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """What the run printed, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def failed(self) -> Path:
        """Why the run failed; there only if it did."""
        return self.folder.with_name(f"{self.folder.name}.failed.json")


def write_config(job: Job, comparison: Comparison, base: dict[str, Any], rounds: int, interval: int) -> None:
    """The run's recipe: the shared one, the method's, the grid point's, then what the comparison sets for every run.

    Args:
        job: The run.
        comparison: Whose run it is.
        base: The shared recipe.
        rounds: At most.
        interval: Rounds between validations.
    """
    method, config = comparison.methods[job.method], copy.deepcopy(base)
    config.setdefault("trainer", {})["algorithm"] = copy.deepcopy(method.algorithm)
    for settings in (comparison.overrides, method.overrides, method.grid[job.point]):
        for key, value in flat(settings).items():
            put(config, key, value)
    limits = {} if comparison.budget.rounds else {comparison.budget.kind: comparison.budget.value}
    folder = job.folder
    config["trainer"] |= {
        "max_rounds": rounds,
        "val_check_interval": interval,
        "controls": [],
        "seed": job.seed,
        "enable_progress_bar": False,
        "enable_checkpointing": True,
        "default_root_dir": str(folder),
        "logger": {
            "class_path": "hosfl_lightning.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder.parent), "name": "", "version": folder.name},
        },
        "callbacks": [
            *(config["trainer"].get("callbacks") or []),
            {"class_path": "hosfl_lightning.callbacks.Budget", "init_args": limits},
        ],
    }
    for part in ("model", "data"):
        put(config, f"{part}.init_args.seed", job.seed)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_whole(job.config, lambda file: file.write(text.encode()))


def schedule(comparison: Comparison, spent: dict[str, float], slack: int = SLACK) -> tuple[int, int]:
    """Rounds of a run at most, and rounds between its validations.

    Args:
        comparison: Its budget and its number of validations.
        spent: What one round of the method spends, by kind of budget.
        slack: How many times the rounds that ``spent`` foretells, where the budget is not of rounds.
    """
    budget = comparison.budget
    if budget.rounds is not None:
        return budget.rounds, ceil(budget.rounds / comparison.validations)
    expected = max(1, ceil(budget.value / spent[budget.kind]))
    return slack * expected, ceil(expected / comparison.validations)


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making what is missing on the way; a class that was only named gets ``init_args``."""
    *path, last = key.split(".")
    for name in path:
        if isinstance(config.get(name), str):
            config[name] = {"class_path": config[name]}
        if not isinstance(config.get(name), dict):
            config[name] = {}
        config = config[name]
    config[last] = copy.deepcopy(value)
