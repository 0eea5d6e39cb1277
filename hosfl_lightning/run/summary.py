"""What a run leaves behind in numbers: summary.json."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median, stdev
from typing import Any

from hosfl_lightning.callbacks import CommunicationMonitor, PeakMemoryMonitor
from hosfl_lightning.files import plain, write_json
from hosfl_lightning.run import privacy
from hosfl_lightning.run.costs import client_costs
from hosfl_lightning.run.face import TrainerFace
from hosfl_lightning.run.result import RunResult

PACKAGES = ("hosfl_lightning", "torch", "lightning", "transformers", "peft")


def gap_closed(method: RunResult, frozen: RunResult, first_order: RunResult) -> float | None:
    r"""``(frozen − method) / (frozen − first-order)`` in validation loss: fraction of the first-order gap recovered.

    None where there is no gap to recover: where the paired difference of the two controls is not above twice its
    standard error over the validation batches. None as well where a loss is no finite number. One run says nothing
    about other seeds.
    """
    pairs = zip(frozen.last.batch_losses, first_order.last.batch_losses, strict=True)
    differences = [a - b for a, b in pairs]
    gap = frozen.last.loss - first_order.last.loss
    if not all(map(math.isfinite, [*differences, gap, method.last.loss])):
        return None
    if len(differences) < 2 or gap <= 2 * stdev(differences) / math.sqrt(len(differences)):
        return None
    return (frozen.last.loss - method.last.loss) / gap


def write_summary(trainer: TrainerFace, result: RunResult, controls: dict[str, RunResult]) -> dict[str, Any]:
    """Write ``summary.json`` into the run folder and return it; what is no finite number is None."""
    summary = plain(summarize(trainer, result, controls))
    if trainer.is_global_zero:
        write_json(Path(trainer.log_dir) / "summary.json", summary, indent=2)
    return summary


def summarize(trainer: TrainerFace, result: RunResult, controls: dict[str, RunResult]) -> dict[str, Any]:
    """The run in numbers; losses in nats, sizes in bytes, times in seconds."""
    memory = next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor)).report
    communication = next(c for c in trainer.callbacks if isinstance(c, CommunicationMonitor))
    costs = client_costs(trainer)
    history, settings = trainer.run.history, trainer.settings
    return {
        "algorithm": trainer.algorithm.name,
        "rounds": trainer.global_step,
        "clients": trainer.datamodule.num_clients,
        "clients_per_round": trainer.sample_size,
        "probes": getattr(trainer.algorithm, "probes", None),
        **costs,
        "val_loss_first": result.first.loss,
        "val_loss_last": result.last.loss,
        "controls": {name: _control(run, controls) for name, run in controls.items()},
        "gap_closed": _gap(result, controls),
        "local_steps": trainer.algorithm.local_steps,
        "client_rounds": communication.client_rounds,
        "bytes_up": communication.up_bytes,
        "bytes_down": communication.down_bytes,
        "seconds_per_round": median(result.seconds) if result.seconds else None,
        "codec": asdict(settings.codec),
        **privacy.summarize(trainer.privacy, trainer.callbacks),
        "catch_up": dict(history.absentees.chosen) if history is not None and history.absentees is not None else {},
        "refused": {str(client): count for client, count in sorted(trainer.run.refused.items())},
        "seed": settings.seed,
        "memory": {name: value for name, value in memory.items() if name.endswith("_bytes")},
        "metrics_first": result.first.metrics,
        "metrics_last": result.last.metrics,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _control(run: RunResult, controls: dict[str, RunResult]) -> dict[str, Any]:
    return {
        "val_loss_last": run.last.loss,
        "metrics_last": run.last.metrics,
        "gap_closed": _gap(run, controls),
        **run.costs,
    }


def _gap(run: RunResult, controls: dict[str, RunResult]) -> float | None:
    """Of a run beside its controls, if both are there."""
    both = {"frozen", "first_order"} <= set(controls)
    return gap_closed(run, controls["frozen"], controls["first_order"]) if both else None


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
