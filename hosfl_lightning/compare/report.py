"""Run folders that are there already, as rows of a table."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hosfl_lightning.compare.runs import Group, Run
from hosfl_lightning.compare.settings import SHARED, ComparisonError, within

#: What differs between runs of one row.
SEEDS = ("trainer.seed", "model.init_args.seed", "data.init_args.seed")
#: The callback that makes a run its own control.
CONTROL = "RandomSigns"
#: Where and how a run was made, which no result depends on.
PLACES = (
    "seed_everything", "trainer.logger", "trainer.callbacks", "trainer.default_root_dir", "trainer.controls",
    "trainer.enable_progress_bar", "trainer.log_every_n_steps",
)  # fmt: skip


def group(folders: Iterable[str]) -> list[Group]:
    """A row for each method and each set of settings; its name says those that differ within the method.

    Raises:
        ComparisonError: A folder is not that of a finished run, or two runs of a row have one seed.
    """
    runs = [Run(Path(folder)) for folder in folders]
    settings = [_settings(run.config) | _control(run) for run in runs]
    groups: dict[str, Group] = {}
    for run, own in zip(runs, settings):
        algorithm = run.summary["algorithm"]
        same = [other for run, other in zip(runs, settings) if run.summary["algorithm"] == algorithm]
        different = [key for key in own if any(other.get(key) != own[key] for other in same)]
        shown = ", ".join(f"{_short(key)} {own[key]}" for key in different)
        row = groups.setdefault(f"{algorithm} ({shown})" if shown else algorithm, Group("", {}))
        row.name = f"{algorithm} ({shown})" if shown else algorithm
        known = row.runs.setdefault(run.summary["seed"], run)
        if known is not run:
            raise ComparisonError(
                f"runs: {known.folder} and {run.folder} are the same method, settings and seed; leave one out"
            )
    return list(groups.values())


def notes(groups: list[Group]) -> list[str]:
    """What was not equal among the runs, with its values, as far as their folders say."""
    runs = [_conditions(run) for one in groups for run in one.runs.values()]
    keys = sorted({key for own in runs for key in own if any(other.get(key) != own[key] for other in runs)})
    named = [f"{key} ({', '.join(dict.fromkeys(str(own.get(key)) for own in runs))})" for key in keys]
    return [f"**Not equal conditions**: the runs differ in {', '.join(named)}"] if named else []


def _conditions(run: Run) -> dict[str, Any]:
    """What is to be the same for all runs, as it took effect where null stands for a default."""
    trainer, summary = run.config["trainer"], run.summary
    shared = {key: value for key, value in _settings(run.config).items() if within(key, SHARED)}
    in_effect = {
        "trainer.clients_per_round": summary["clients_per_round"],
        **{f"trainer.codec.{name}": codec for name, codec in summary["codec"].items()},
        "trainer.simulation": trainer["simulation"] or ("batched" if _one_process(trainer) else "per_client"),
    }
    return shared | in_effect | _limits(run)


def _one_process(trainer: dict[str, Any]) -> bool:
    return trainer["devices"] == 1 and trainer.get("num_nodes", 1) == 1  # older runs know no nodes


def _limits(run: Run) -> dict[str, Any]:
    """What ended the run: the limits of its budget, under which methods may take unlike numbers of rounds, or these."""
    trainer, rounds = run.config["trainer"], run.summary["rounds"]
    budgets = [
        {f"Budget.{name}": limit for name, limit in one["init_args"].items() if limit is not None}
        for one in _callbacks(run)
        if one["class_path"].endswith(".Budget")
    ]
    limits = dict(ChainMap(*budgets))
    return limits if limits and rounds < trainer["max_rounds"] else {"rounds": rounds}


def _control(run: Run) -> dict[str, str]:
    """The one callback on which results depend, as a setting."""
    names = [one["class_path"].rpartition(".")[2] for one in _callbacks(run)]
    return {"trainer.callbacks": CONTROL} if CONTROL in names else {}


def _callbacks(run: Run) -> list[dict[str, Any]]:
    callbacks = run.config["trainer"]["callbacks"] or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _settings(config: Any, name: str = "") -> dict[str, Any]:
    """Leaves by dotted key, without seeds and places."""
    if name in SEEDS + PLACES:
        return {}
    if isinstance(config, dict) and config:
        parts = [_settings(value, f"{name}.{key}" if name else key) for key, value in config.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {name: config}


def _short(key: str) -> str:
    names = [name for name in key.split(".") if name not in ("init_args", "trainer", "algorithm", "model", "data")]
    return ".".join(names)
