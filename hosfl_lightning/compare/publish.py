"""The results as one W&B run: table, curves and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

from hosfl_lightning.compare.settings import Publish
from hosfl_lightning.compare.table import rows


def publish(results: dict[str, Any], pictures: dict[str, Path], settings: Publish, folder: Path) -> None:
    """Log once; the curves go over rounds, a line a method, and the run ends here.

    | logged key | meaning |
    |---|---|
    | ``table`` | what ``table.md`` shows, in one table |
    | ``<picture>`` | ``rounds``, ``bytes``, ``client_forwards``, ``memory`` |
    | ``curve/<method>`` | mean over seeds of the validation metric |
    """
    metric = results["metric"] or "loss"
    config = {name: value for name, value in results.items() if name not in ("methods", "notes")}
    with wandb.init(project=settings.project, mode=settings.mode, dir=folder, job_type="compare", config=config) as run:
        run.define_metric("curve/*", step_metric="round")
        points: dict[float, dict[str, float]] = {}
        for name, row in results["methods"].items():
            for point in row["curve"]:
                points.setdefault(point["round"], {})[f"curve/{name}"] = point[metric]["mean"]
        for round, values in sorted(points.items()):
            run.log({"round": round, **values})
        head, body = rows(results)
        images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        run.log({"table": wandb.Table(columns=[*head], data=body), **images})
