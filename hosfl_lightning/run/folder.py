"""The run folder: what writes into it, and how a run finds its own again."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import CSVLogger as StockCSVLogger
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from hosfl_lightning.data.labels import LABELS, write_label_names
from hosfl_lightning.files import rename, write_json, write_whole
from hosfl_lightning.fleet import Processes
from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.run.checkpoint import CheckpointError, load, whole

LOG = "updates.log"
IDENTITY = "run.json"


class Made(NamedTuple):
    """What a run is made of.

    Args:
        settings: `hosfl_lightning.run.settings.RunSettings.agreed`.
        record: `hosfl_lightning.run.record.record_of`; empty: an earlier version made it.
    """

    settings: dict[str, Any]
    record: dict[str, Any]


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    Args:
        folder: Its own folder; None: the checkpoint lies outside of one, so the run goes on in a new folder.
        checkpoint: The last complete one; None: the run died before its first, and begins anew in its folder.
        later: Checkpoints in the folder that the run goes back before.
    """

    folder: Path | None
    checkpoint: dict[str, Any] | None
    later: Sequence[Path] = ()

    @property
    def round(self) -> int:
        """Rounds that need not be run again."""
        return self.checkpoint["global_step"] if self.checkpoint is not None else 0

    @property
    def files(self) -> dict[str, bool | None]:
        """What was to be written or deleted in the checkpoint's round: checkpoints of this folder, whatever it says."""
        folder, named = self.folder, (self.checkpoint or {}).get("files", {})
        if folder is None:
            return {}
        own = {name for name in named if (folder / name).resolve().is_relative_to(folder.resolve())}
        return {name: how for name, how in named.items() if name in own and name.endswith(".ckpt")}

    @property
    def made(self) -> Made | None:
        """What the run is made of; None: it began with an earlier version, and no round of it is on the disk."""
        held = self.checkpoint or (_identity(self.folder) if self.folder is not None else {})
        return Made(held["settings"], held.get("record") or {}) if "settings" in held else None

    @property
    def last_row(self) -> int:
        """The last row of metrics that stays; −1: none."""
        return self.round if self.checkpoint is not None else -1


def find(ckpt_path: str) -> Resumption:
    """A run's folder, or a checkpoint file; with the folder, the last complete checkpoint in it.

    Raises:
        CheckpointError: Neither a checkpoint nor a run folder.
    """
    path = Path(ckpt_path)
    if path.is_dir():
        if not (path / IDENTITY).is_file():
            raise CheckpointError(
                f"ckpt_path: {ckpt_path!r} is not the folder of a run that can go on: it has no {IDENTITY}, which is "
                "written before the first round; begin anew without ckpt_path"
            )
        found = max(_complete(path), key=lambda one: one[1]["global_step"], default=None)
        return Resumption(path.absolute(), found[1] if found else None)
    checkpoint = load(path)
    # Not always the folder above `checkpoints`: "{val/loss}" in a file's name makes one of its own.
    folder = next((one for one in path.absolute().parents[1:3] if (one / IDENTITY).is_file()), None)
    if folder is None:
        return Resumption(None, checkpoint)
    later = [file for file, one in _complete(folder) if one["global_step"] > checkpoint["global_step"]]
    return Resumption(folder, checkpoint, later)


@rank_zero_only
def leave(ckpt_path: str | None, name: str, metrics: dict[str, float]) -> None:
    """Of an evaluation, in the folder of the run to which the checkpoint belongs; from elsewhere it leaves none."""
    if not ckpt_path:
        return
    path = Path(ckpt_path).absolute()
    folders = [path] if path.is_dir() else path.parents[:3]
    run = next((one for one in folders if (one / IDENTITY).is_file()), None)
    if run is not None:
        write_json(run / name, metrics, indent=2)


def weights(ckpt_path: str) -> dict[str, Any]:
    """A checkpoint file; of a run's folder, the last one in it, which may hold weights only.

    Raises:
        CheckpointError: Neither a checkpoint nor a folder with one.
    """
    path = Path(ckpt_path)
    if not path.is_dir():
        return load(path)
    found = max(whole(path), key=lambda one: one[1]["global_step"], default=None)
    if found is None:
        raise CheckpointError(f"ckpt_path: {ckpt_path!r} is no run's folder with a checkpoint in it")
    return found[1]


def _complete(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints from which a run can go on: passing over another costs rounds, no bits."""
    return ((file, checkpoint) for file, checkpoint in whole(folder) if "method" in checkpoint)


def given(logger: bool | Logger | Iterable[Logger] | None) -> list[Logger]:
    """Those that a user names."""
    return [logger] if isinstance(logger, Logger) else [] if logger is None or isinstance(logger, bool) else [*logger]


@contextmanager
def only(trainer: Any, loggers: Sequence[Logger]) -> Iterator[None]:
    """While open, the trainer has no others, so that nothing makes a folder that nobody asked for."""
    before, trainer.loggers = trainer.loggers, [one for one in trainer.loggers if one in loggers]
    try:
        yield
    finally:
        trainer.loggers = before


def make_loggers(logger: bool | Logger | Iterable[Logger] | None, root: str) -> list[Logger]:
    """The loggers; first the `CSVLogger` whose folder is the run's, a new one where none is given."""
    if not logger:
        return []
    own = given(logger)
    own.sort(key=lambda one: not isinstance(one, StockCSVLogger))
    for one in own:
        # What Lightning passes where nothing is asked for, and W&B warns of.
        if isinstance(one, WandbLogger) and one._wandb_init.get("anonymous", "") is None:
            del one._wandb_init["anonymous"]
    return own if own and isinstance(own[0], StockCSVLogger) else [CSVLogger(root, name=""), *own]


def agree(loggers: Sequence[Logger], processes: Processes) -> None:
    """All processes name the folder that the first one writes: each would number a new one for itself."""
    for logger in loggers:
        if hasattr(logger, "_version"):
            logger._version, *_ = processes.share(logger.version)


def adopt(loggers: Sequence[Logger], resumed: Resumption) -> None:
    """Point fresh loggers at the folder of a run that goes on; nothing that is in it is lost yet.

    Raises:
        ValueError: A logger that would delete what it wrote.
    """
    if resumed.folder is None:
        return
    identity = _identity(resumed.folder)
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            # As the logger was given: ModelCheckpoint compares its folder's name with the one it had.
            relative = not os.path.isabs(logger.save_dir)
            if Path(logger.root_dir).resolve() != resumed.folder.resolve().parent:
                rank_zero_info(f"the run goes on in {resumed.folder}, not in {logger.root_dir}")
            logger.resume(sys.maxsize, os.path.relpath(resumed.folder) if relative else resumed.folder)
        elif isinstance(logger, StockCSVLogger):
            raise ValueError(
                "trainer.logger: Lightning's CSVLogger deletes metrics.csv when a run goes on; "
                "use hosfl_lightning.loggers.CSVLogger"
            )
        elif isinstance(logger, WandbLogger) and "wandb" in identity:
            logger._id = identity["wandb"]
            logger._wandb_init.update(id=identity["wandb"], resume="allow")


def tell_of_another(folder: str) -> None:
    """Say that a run without loggers, which has no folder of its own, replaces the one that is there."""
    if (Path(folder) / IDENTITY).is_file():
        rank_zero_info(f"trainer.logger: false makes no folder for a run, so this one replaces the one in {folder}")


def check_start(resumed: Resumption, start: str) -> None:
    """Whether a model is as it was when the run began.

    Args:
        resumed: Where the run goes on.
        start: Digest of the tensors that are trained, of both halves.

    Raises:
        ValueError: It is not.
    """
    if resumed.folder is not None and _identity(resumed.folder)["start"] != start:
        raise ValueError(
            "trainer.controls begin where the run began, but this model has been trained since: build it anew"
        )


def set_aside(folder: str, resumed: Resumption | None) -> None:
    """Rename the checkpoints that an earlier run left in the folder of one that begins, which would go on from them.

    The identity is the first, and the new run's is written last: in between the folder is no run's.
    """
    path = Path(folder)
    if resumed is not None and resumed.folder is not None and resumed.folder.resolve() == path.resolve():
        return
    for file in (path / IDENTITY, *sorted((path / "checkpoints").rglob("*.ckpt"))):
        if file.exists():
            rename(file, f"{file}.before")


@rank_zero_only
def rewind(loggers: Sequence[Logger], resumed: Resumption) -> None:
    """Set checkpoints after the one that is resumed aside, then drop the rows after it: both are written again.

    A later checkpoint that stayed would be the run's last one, with rows missing before it.
    """
    for file in resumed.later:
        rename(file, f"{file}.later")
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger.resume(resumed.last_row)


def open_loggers(loggers: Sequence[Logger]) -> None:
    """Make the folder before anything is written into it; W&B's curves go over rounds."""
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if isinstance(logger, WandbLogger):
            experiment.define_metric("round")
            experiment.define_metric("*", step_metric="round", step_sync=True)


def remember(folder: str, own: dict[str, Any], loggers: Sequence[Logger]) -> None:
    """Write what the run needs to find itself again: its id, what it is made of, where it started, and W&B's id.

    A folder without it is no run's. What is known of a run that goes on stays.
    """
    known = _identity(Path(folder)) if (Path(folder) / IDENTITY).is_file() else {}
    ids = [logger.version for logger in loggers if isinstance(logger, WandbLogger)]
    identity = {**own, **known, **({"wandb": ids[-1]} if ids else {})}
    write_whole(Path(folder) / IDENTITY, lambda file: file.write(json.dumps(identity).encode()))


def write_labels(folder: str, names: Sequence[str] | None) -> None:
    """The names of the classes by index, as `data.init_args.labels` reads them."""
    if names is not None:
        write_whole(Path(folder) / LABELS, lambda file: file.write(write_label_names(names)))


def how_to_go_on(folder: str) -> str:
    """What to tell whoever interrupted the run."""
    if (Path(folder) / IDENTITY).is_file():
        return f"go on with --ckpt_path={folder}"
    return "no round had begun: start it anew"


@contextmanager
def may_hold_checkpoints(folder: str) -> Iterator[None]:
    """ModelCheckpoint warns of a folder that is not empty, as one in which a run goes on is meant to be."""
    with warnings.catch_warnings():
        if (Path(folder) / IDENTITY).is_file():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        yield


def _identity(folder: Path) -> dict[str, Any]:
    return json.loads((folder / IDENTITY).read_text())
