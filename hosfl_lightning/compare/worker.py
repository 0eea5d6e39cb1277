"""What the worker processes of a comparison do; each lives on, so that the libraries are imported once."""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from typing_extensions import override

from hosfl_lightning import recipe
from hosfl_lightning.callbacks import Budget
from hosfl_lightning.compare.clock import Clock
from hosfl_lightning.compare.conditions import CONDITIONS, conditions
from hosfl_lightning.compare.configs import Job
from hosfl_lightning.compare.settings import ComparisonError
from hosfl_lightning.files import write_json
from hosfl_lightning.run.divergence import DIVERGED
from hosfl_lightning.run.folder import IDENTITY

#: What the test set gave, in the run folder of a chosen point.
TEST = "test.json"
#: The prefix of what it gave once more, with the client half put back to its start.
PUT_BACK = "client_put_back/"


@dataclass(frozen=True)
class Rehearsal:
    """What the first round of a method showed.

    Args:
        spent: In one round, by kind of budget.
        metrics: What its validation logs.
        validation: Number of validation examples.
        test: Number of test examples.
        data: The class of its data, and the settings that name a test set.
        seconds: Of the ``round``, of a ``validation``, and of all else (``start``); empty: not measured.
    """

    spent: dict[str, float]
    metrics: list[str]
    validation: int
    test: int
    data: str
    seconds: dict[str, float] = field(default_factory=dict)


class ParseOnly(recipe.HOSFLCommand):
    """Finds what is wrong with a recipe without building anything."""

    @override
    def instantiate_classes(self) -> None:
        """Nothing."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


class Evaluate(recipe.HOSFLCommand):
    """The test set by what a run ended with, then with the client half as it was before the first round."""

    def before_test(self) -> None:
        """The model is as its recipe builds it: that is the start."""
        state = self.model.trained_state()
        self.start = {name: bits.clone() for name, bits in state.items() if name.startswith("client_half.")}

    @override
    def after_test(self) -> None:
        """A client half that stayed at its start needs no second pass; clients that hold the whole model have none."""
        super().after_test()
        trainer: Any = self.trainer
        self.values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        ended = self.model.trained_state()
        moved = any(not torch.equal(bits.to(ended[name]), ended[name]) for name, bits in self.start.items())
        moved = moved or bool(trainer.own_halves)
        if moved and trainer.algorithm.client_holds == "half":
            self.model.load_trained_state(ended | self.start)
            [again] = trainer.test(self.model, self.datamodule)
            self.values |= {PUT_BACK + name.removeprefix("test/"): value for name, value in again.items()}


def begin(parent: Connection) -> None:
    """At the start of a worker: one thread, no interrupts, and an end with the parent, whatever ends that.

    Args:
        parent: Nothing is ever sent through it; it closes with the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def follow() -> None:
        with suppress(EOFError, OSError):
            parent.recv()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def rehearse(jobs: list[Job]) -> Rehearsal:
    """Parse the recipes of a method's points, and run the first of them, which is to have one round.

    Raises:
        ComparisonError: A recipe is refused, or its first round fails.
    """
    job = jobs[0]
    print_into(job.log)
    try:
        for one in jobs:
            recipe.command(["fit", f"--config={one.config}"], ParseOnly)
        shutil.rmtree(job.folder, ignore_errors=True)
        began = time.perf_counter()
        command = recipe.command(["fit", f"--config={job.config}", f"--trainer.callbacks+={Clock.__module__}.Clock"])
        took = time.perf_counter() - began
    except SystemExit as end:
        raise ComparisonError(f"methods.{job.method}: {end.__cause__ or end}") from None
    except recipe.USER_ERRORS as error:
        raise ComparisonError(f"methods.{job.method}: {error}") from None
    trainer: Any = command.trainer
    data: Any = command.datamodule
    if not (job.folder / "checkpoints" / "last.ckpt").is_file():
        raise ComparisonError("trainer.callbacks: a ModelCheckpoint of the recipe leaves no last.ckpt; leave it out")
    _write(job.folder / CONDITIONS, conditions(data))
    budget = next(c for c in trainer.callbacks if isinstance(c, Budget))
    validations = next(c for c in trainer.callbacks if isinstance(c, Clock)).validations
    (round,) = trainer.run.result.seconds
    named = [name for name in inspect.signature(type(data)).parameters if name.startswith("test")]
    return Rehearsal(
        spent=budget.spent,
        metrics=sorted(trainer.run.result.last.metrics),
        validation=len(data.validation_set),
        test=len(data.test_set),
        data=f"{type(data).__name__} ({', '.join(f'data.init_args.{name}' for name in named)})",
        seconds={
            "start": took - round - sum(validations), "round": round, "validation": sum(validations) / len(validations)
        },
    )  # fmt: skip


def run(job: Job, test: bool) -> str | None:
    """Run a job, or go on with it, then the test set once; the reason if it failed.

    Args:
        job: Its recipe is written.
        test: Whether the point was chosen, so that the test set may be touched.
    """
    print_into(job.log)
    try:
        if not (job.folder / CONDITIONS).is_file():
            fit(job)
        if test and not (job.folder / TEST).is_file():
            evaluate(job)
    except DIVERGED as error:
        reason = str(error).partition(";")[0]  # what follows is how a single run would go on
        _write(job.failed, {"reason": reason})
        return reason
    return None


def fit(job: Job) -> None:
    """The rounds, from the last checkpoint where there is one."""
    begun = (job.folder / IDENTITY).is_file()
    if not begun:
        shutil.rmtree(job.folder, ignore_errors=True)
    resumed = [f"--ckpt_path={job.folder}"] if begun else []
    command = recipe.command(["fit", f"--config={job.config}", *resumed])
    data: Any = command.datamodule
    _write(job.folder / CONDITIONS, conditions(data))


def evaluate(job: Job) -> None:
    """The test set, by what the run ended with, and once more without what its client learned."""
    last = job.folder / "checkpoints" / "last.ckpt"
    arguments = ["test", f"--config={job.config}", f"--ckpt_path={last}", "--trainer.logger=false"]
    command: Any = recipe.command(arguments, Evaluate)
    _write(job.folder / TEST, command.values)


def print_into(path: Path) -> None:
    """Everything that this process prints, libraries included, goes to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _write(path: Path, content: dict[str, Any]) -> None:
    write_json(path, content)
