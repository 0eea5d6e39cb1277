from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.loggers.csv import MetricsFileError
from tests.faults import Killed, count_writes, killed_at, points

#: New columns at step 0, 1, 3 (in the middle and at both ends of the alphabet) and 5; values that need quotes.
ROWS: list[dict[str, Any]] = [
    {"val/loss": 3.0},
    {"train/loss": torch.tensor(2.5), "note": 'a, "b"'},
    {"train/loss": 0.1 + 0.2},
    {"train/loss": 2.0, "a": 1, "val/loss": 2.25, "zz": float("nan")},
    {"train/loss": 1.5},
    {"train/loss": 1.25, "b": 1e-300},
]


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    with count_writes():
        yield


def log(logger: LightningCSVLogger, first: int = 0, last: int = len(ROWS) - 1) -> None:
    for step in range(first, last + 1):
        logger.log_metrics(ROWS[step], step)
        logger.save()


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.csv").read_bytes()


def uninterrupted(root: Path, last: int = len(ROWS) - 1) -> bytes:
    logger = CSVLogger(root, name="whole")
    log(logger, last=last)
    return metrics(Path(logger.log_dir))


@pytest.mark.parametrize("every", [1, 100], ids=["saved row by row", "saved at the end"])
def test_the_files_are_lightnings(tmp_path: Path, every: int) -> None:
    folders = []
    for cls in (CSVLogger, LightningCSVLogger):
        logger = cls(tmp_path, name=cls.__module__, prefix="p", flush_logs_every_n_steps=every)
        logger.log_hyperparams({"lr": 0.1})
        for step, row in enumerate(ROWS):
            logger.log_metrics(row, step)
        logger.log_metrics({"without a step": 1})
        logger.finalize("success")
        folders.append(Path(logger.log_dir))
    ours, theirs = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert ours == theirs
    assert ours.keys() == {"metrics.csv", "hparams.yaml"}


def test_a_run_that_is_not_resumed_treats_a_used_folder_as_lightning_does(tmp_path: Path) -> None:
    for version, cls in enumerate((CSVLogger, LightningCSVLogger)):
        log(cls(tmp_path, name="", version=version))
        again = cls(tmp_path, name="", version=version)
        with pytest.warns(UserWarning, match="exists and is not empty"):
            log(again, last=1)
    assert metrics(tmp_path / "version_0") == metrics(tmp_path / "version_1") == uninterrupted(tmp_path, last=1)
    assert CSVLogger(tmp_path, name="").version == 2


@pytest.mark.parametrize("round", range(len(ROWS)))
def test_a_resumed_run_ends_with_the_file_of_one_that_was_never_killed(tmp_path: Path, round: int) -> None:
    log(CSVLogger(tmp_path, name="", version="run"))
    logger = CSVLogger(tmp_path, name="")
    logger.resume(round, tmp_path / "run")
    assert Path(logger.log_dir) == tmp_path / "run"
    assert metrics(tmp_path / "run") == uninterrupted(tmp_path, last=round)
    log(logger, first=round + 1)
    assert metrics(tmp_path / "run") == uninterrupted(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("version")] == []


def test_every_torn_last_line_is_dropped(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path, last=4)
    folder = tmp_path / "run"
    folder.mkdir()
    start = whole[:-2].rindex(b"\r\n") + 2
    for tail in [whole[start:size] for size in range(start, len(whole))] + [b"\0" * 600]:
        (folder / "metrics.csv").write_bytes(whole[:start] + tail)
        logger = CSVLogger(tmp_path)
        logger.resume(3, folder)
        log(logger, first=4)
        assert metrics(folder) == uninterrupted(tmp_path)


def test_a_run_resumed_before_its_first_row_starts_anew(tmp_path: Path) -> None:
    log(CSVLogger(tmp_path, name="", version=0))
    logger = CSVLogger(tmp_path, name="", version=0)
    logger.resume(-1)
    assert metrics(tmp_path / "version_0") == b""
    log(logger)
    assert metrics(tmp_path / "version_0") == uninterrupted(tmp_path)


def test_a_folder_without_metrics_can_be_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "run"
    folder.mkdir(parents=True)
    (folder / "other.txt").write_text("stays")
    logger = CSVLogger(tmp_path)
    logger.resume(0, folder)
    log(logger)
    assert metrics(folder) == uninterrupted(tmp_path)
    assert {p.name for p in folder.iterdir()} == {"metrics.csv", "other.txt"}


def test_a_logger_in_use_can_go_back_in_its_own_folder_only(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    log(logger, last=1)
    logger.log_metrics(ROWS[2], 2)  # not saved yet
    logger.log_metrics({"later": 1.0}, 3)
    logger.resume(2, tmp_path / "other" / ".." / "run")
    log(logger, first=3)
    assert metrics(tmp_path / "run") == uninterrupted(tmp_path)
    with pytest.raises(RuntimeError, match="make a new one to go on in"):
        logger.resume(2, tmp_path / "other")


def test_a_row_that_a_save_wrote_survives(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    log(logger, last=1)
    for step, expected in ((2, ["write", "fsync"]), (3, ["write", "fsync", "replace", "fsync"])):
        with count_writes() as calls:
            log(logger, step, step)
        assert calls == expected


def train(root: Path, round: int | None, saved: list[int]) -> None:
    """Log all rows, or those after ``round``, and add to ``saved`` each step whose save returned."""
    logger = CSVLogger(root, name="", version="run")
    if round is not None:
        logger.resume(round)
    for step in range(0 if round is None else round + 1, len(ROWS)):
        log(logger, step, step)
        saved.append(step)


def test_wherever_a_run_is_killed_it_can_go_on_from_any_row_before(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path)
    with count_writes() as calls:
        train(tmp_path / "counted", None, [])
    assert calls.count("write") == len(ROWS)
    for n, torn in points(calls):
        for round in range(-1, len(ROWS)):
            root = tmp_path / f"{n}_{torn}_{round}"
            saved = [-1]
            with pytest.raises(Killed), killed_at(n, torn):
                train(root, None, saved)
            if round > saved[-1]:
                break
            train(root, round, [])
            assert metrics(root / "run") == whole, (n, torn, round)


def test_wherever_a_resumed_run_is_killed_it_can_be_resumed_again(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path)
    train(tmp_path / "counted", None, [])
    with count_writes() as calls:
        train(tmp_path / "counted", 2, [])
    for n, torn in points(calls):
        root = tmp_path / f"{n}_{torn}"
        train(root, None, [])
        with pytest.raises(Killed), killed_at(n, torn):
            train(root, 2, [])
        train(root, 2, [])
        assert metrics(root / "run") == whole, (n, torn)


def test_standard_readers_read_a_resumed_file(tmp_path: Path) -> None:
    log(CSVLogger(tmp_path, name="", version="run"))
    logger = CSVLogger(tmp_path)
    logger.resume(3, tmp_path / "run")
    log(logger, first=4)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert rows[1]["note"] == 'a, "b"'
    assert float(rows[2]["train/loss"]) == 0.1 + 0.2


@pytest.mark.parametrize("content", [b"a,b\r\n1,2\r\n", b"a,step\r\n1,x\r\n", b"a,step\r\n1\r\n", b"\xff\xff\r\n1\r\n"])
def test_what_is_no_metrics_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(MetricsFileError, match="move it away"):
        CSVLogger(tmp_path.parent).resume(0, tmp_path)
    assert metrics(tmp_path) == content


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(CSVLogger(tmp_path, name="", version="run"))
    before = metrics(tmp_path / "run")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger(tmp_path)
    logger.resume(0, tmp_path / "run")
    log(logger)
    assert Path(logger.log_dir) == tmp_path / "run"
    assert metrics(tmp_path / "run") == before
    _ = CSVLogger(tmp_path, name="", version="new").experiment
    assert not (tmp_path / "new").exists()


def test_a_remote_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="save_dir must be a folder on a local disk"):
        _ = CSVLogger("memory://runs").experiment
