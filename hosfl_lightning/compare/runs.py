"""Run folders, read: of a comparison or of ``hosfl fit``."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hosfl_lightning.compare.settings import ComparisonError
from hosfl_lightning.compare.worker import PUT_BACK, TEST

FORWARDS = "budget/client_forwards"
#: The abscissae of a curve, and their columns in metrics.csv.
ABSCISSAE = {"round": "round", "bytes": "comm/total_bytes", "client_forwards": FORWARDS}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: With ``summary.json``, ``metrics.csv`` and ``config.yaml``; ``test.json`` if it was tested.

    Raises:
        ComparisonError: The folder is not that of a finished run.
    """

    folder: Path

    def __post_init__(self) -> None:
        for name in ("summary.json", "metrics.csv", "config.yaml"):
            if not (self.folder / name).is_file():
                raise ComparisonError(f"{self.folder} is not the folder of a finished run: there is no {name} in it")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the run says of itself."""
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its recipe, every default written out."""
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @cached_property
    def test(self) -> dict[str, float] | None:
        """Test metrics without their prefix; None if the test set was not touched."""
        return None if self._tested is None else _metrics(self._tested, "test/")

    @cached_property
    def put_back(self) -> dict[str, float]:
        """The same with the client half put back to its start; none where it never left it, or was not tested so."""
        return _metrics(self._tested or {}, PUT_BACK)

    @cached_property
    def _tested(self) -> dict[str, float | None] | None:
        path = self.folder / TEST
        return json.loads(path.read_text()) if path.is_file() else None

    @cached_property
    def validation(self) -> dict[str, float]:
        """Validation metrics at the end, without their prefix."""
        return _metrics(self.summary["metrics_last"], "val/")

    @cached_property
    def curve(self) -> list[dict[str, float]]:
        """A row a validation: the abscissae that are known, and the metrics without their prefix."""
        return [self._point(row) for row in self._rows if row["val/loss"]]

    @cached_property
    def costs(self) -> dict[str, float | None]:
        """What the run cost its clients; bytes, seconds, plain forwards. None of what was not measured.

        A client-round is one client's part in one round; those that were away had none.
        """
        summary, client_rounds = self.summary, self.summary.get("client_rounds")
        up, down = summary.get("bytes_up"), summary.get("bytes_down")
        return {
            "rounds": summary["rounds"],
            "d_client": summary.get("d_client"),
            "client_peak_bytes": summary["client_peak_bytes"],
            "client_inference_bytes": summary["client_forward_bytes"],
            "bytes_up_per_client_round": _ratio(up, client_rounds),
            "bytes_down_per_client_round": _ratio(down, client_rounds),
            "bytes_up": up,
            "bytes_down": down,
            "client_seconds_per_round": summary.get("client_seconds_per_round"),
            "client_forwards_per_round": summary.get("client_forwards_per_round"),
            "client_forwards": self._client_forwards,
        }

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "metrics.csv").read_text().splitlines()))

    @property
    def _client_forwards(self) -> float | None:
        """Of all clients: as the callback Budget counted them, else the client-rounds at what one of them takes."""
        counted = [row[FORWARDS] for row in self._rows if row.get(FORWARDS)]
        if counted:
            return float(counted[-1])
        each, client_rounds = self.summary.get("client_forwards_per_round"), self.summary.get("client_rounds")
        return None if each is None or client_rounds is None else each * client_rounds

    def _point(self, row: dict[str, str]) -> dict[str, float]:
        point = {name: float(value) for name, value in _bare(row, "val/").items() if value}
        for name, column in ABSCISSAE.items():
            if row.get(column):
                point[name] = float(row[column])
        spent = self.costs["client_forwards"]
        if spent is not None and self.summary["rounds"]:  # of a run without the callback Budget
            point.setdefault("client_forwards", spent * point["round"] / self.summary["rounds"])
        return dict.fromkeys(ABSCISSAE, 0.0) | point if point["round"] == 0 else point


@dataclass
class Group:
    """One row of the table: the runs of a method, one a seed.

    Args:
        name: In the table.
        runs: Finished ones by seed.
        failed: Why the others failed, by seed.
        details: What else the results say of the method.
    """

    name: str
    runs: dict[int, Run]
    failed: dict[int, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def algorithm(self) -> str | None:
        """The class of the method."""
        return next((run.summary["algorithm"] for run in self.runs.values()), None)


def _ratio(total: float | None, parts: int | None) -> float | None:
    return total / parts if total is not None and parts else None


def _metrics(metrics: dict[str, float | None], prefix: str) -> dict[str, float]:
    """NaN where JSON has null: what was no finite number."""
    return {name: math.nan if value is None else value for name, value in _bare(metrics, prefix).items()}


def _bare(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
