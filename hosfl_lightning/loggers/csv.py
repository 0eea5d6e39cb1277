"""CSVLogger: Lightning's, for runs that are killed and resumed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter as LightningExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from hosfl_lightning.files import append, write_whole


class MetricsFileError(ValueError):
    """A file that should hold a run's metrics does not."""


class CSVLogger(LightningCSVLogger):
    """Lightning's ``CSVLogger``, the same files byte for byte; but a kill leaves them whole, and a run can go on.

    Rows are appended and synced where Lightning writes them (every ``flush_logs_every_n_steps``, and in ``save``); a
    row with a new column rewrites the file whole or not at all. As with Lightning's, a run that is *not* resumed
    deletes the ``metrics.csv`` of a folder that it is given.

    Example::

        logger = CSVLogger("runs", name="")
        logger.resume(round=200, folder="runs/version_3")  # before the first use
        logger.log_metrics({"train/loss": 2.5}, step=201)
        logger.save()

    Args:
        save_dir, name, version, prefix, flush_logs_every_n_steps: As Lightning's; ``save_dir`` on a local disk.
    """

    _experiment: ExperimentWriter | None

    def resume(self, round: int, folder: str | os.PathLike[str] | None = None) -> None:
        """Go on in a run's folder: rows of steps > ``round`` are dropped, with the columns that only they had.

        Args:
            round: Of the checkpoint; the last step whose rows stay.
            folder: The run's folder, the ``log_dir`` of its logger; None: the one this logger has.

        Raises:
            MetricsFileError: The folder's ``metrics.csv`` is not one.
            RuntimeError: This logger writes into another folder already.
        """
        if folder is not None and Path(folder).resolve() != Path(self.log_dir).resolve():
            if self._experiment is not None:
                raise RuntimeError(f"the logger writes into {self.log_dir}: make a new one to go on in {folder}")
            self._save_dir = self._root_dir = str(Path(folder).parent)
            self._name, self._version = "", Path(folder).name
        self._resume(round)

    @rank_zero_only
    def _resume(self, round: int) -> None:
        if self._experiment is None:
            self._experiment = ExperimentWriter(self.log_dir, keep=True)
        self._experiment.save()
        self._experiment.resume(round)

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Writes the files; made, with the folder, at the first use."""
        if self._experiment is None:
            self._experiment = ExperimentWriter(self.log_dir)
        return self._experiment


class ExperimentWriter(LightningExperimentWriter):
    """Writes ``metrics.csv`` through :mod:`hosfl_lightning.files`, and ``hparams.yaml`` as Lightning does.

    Args:
        log_dir: The run's folder.
        keep: Go on with the files that are there.
    """

    def __init__(self, log_dir: str, keep: bool = False) -> None:
        if "://" in log_dir:
            raise ValueError(f"save_dir must be a folder on a local disk, got {log_dir!r}")
        self._keep = keep
        super().__init__(log_dir)

    @override
    def save(self) -> None:
        """Write the rows that were logged since the last call."""
        if not self.metrics:
            return
        columns = sorted({*self.metrics_keys, *(name for row in self.metrics for name in row)})
        if columns == self.metrics_keys and os.path.isfile(self.metrics_file_path):
            append(self.metrics_file_path, _encode(self.metrics, columns))
        else:
            self._rewrite([*self._read(), *self.metrics], columns)
        self.metrics = []

    def resume(self, round: int) -> None:
        """Keep the whole rows of steps <= ``round``, and their columns."""
        try:
            rows = [row for row in self._read() if int(row["step"]) <= round]
        except (KeyError, TypeError, ValueError) as error:
            raise MetricsFileError(
                f"{self.metrics_file_path}: rows without a step: not by a CSVLogger; move it away to go on without it"
            ) from error
        self._rewrite(rows, sorted({name for row in rows for name, value in row.items() if value != ""}))

    def _read(self) -> list[dict[str, Any]]:
        """The file's rows as text. What follows the last line's end is the part of a row that a kill left."""
        if not os.path.isfile(self.metrics_file_path):
            return []
        whole, end, _ = Path(self.metrics_file_path).read_bytes().rpartition(b"\r\n")
        return list(csv.DictReader(io.StringIO((whole + end).decode(), newline="")))

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        data = _encode([dict(zip(columns, columns)), *rows], columns) if columns else b""
        write_whole(self.metrics_file_path, lambda file: file.write(data))
        self.metrics_keys = columns

    @override
    def _check_log_dir_exists(self) -> None:
        if not self._keep:
            super()._check_log_dir_exists()


def _encode(rows: Iterable[dict[str, Any]], columns: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, extrasaction="ignore").writerows(rows)
    return text.getvalue().encode()
