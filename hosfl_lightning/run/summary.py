"""What a run leaves behind: summary.json and the table people read."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from hosfl_lightning.callbacks import CommunicationMonitor, PeakMemoryMonitor
from hosfl_lightning.files import plain, write_json
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
    both = {"frozen", "first_order"} <= set(controls)
    history, settings = trainer.run.history, trainer.settings
    return {
        "algorithm": trainer.algorithm.name,
        "rounds": trainer.global_step,
        "clients": trainer.datamodule.num_clients,
        "clients_per_round": trainer.sample_size,
        "probes": getattr(trainer.algorithm, "probes", None),
        "d_client": sum(p.numel() for p in trainer.endpoint.trained.values()),
        "val_loss_first": result.first.loss,
        "val_loss_last": result.last.loss,
        "controls": {name: {"val_loss_last": run.last.loss} for name, run in controls.items()},
        "gap_closed": gap_closed(result, controls["frozen"], controls["first_order"]) if both else None,
        "client_peak_bytes": memory.get("client_peak_bytes"),
        "client_forward_bytes": memory.get("client_forward_bytes"),
        "client_forwards_per_round": memory.get("client_forwards"),
        "client_seconds_per_round": memory.get("client_seconds"),
        "local_steps": trainer.algorithm.local_steps,
        "bytes_per_client_round": communication.per_client_round,
        "client_rounds": communication.client_rounds,
        "bytes_up": communication.up_bytes,
        "bytes_down": communication.down_bytes,
        "seconds_per_round": median(result.seconds) if result.seconds else None,
        "codec": asdict(settings.codec),
        "catch_up": dict(history.absentees.chosen) if history is not None and history.absentees is not None else {},
        "refused": {str(client): count for client, count in sorted(trainer.run.refused.items())},
        "seed": settings.seed,
        "memory": {name: value for name, value in memory.items() if name.endswith("_bytes")},
        "metrics_first": result.first.metrics,
        "metrics_last": result.last.metrics,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def print_table(summary: dict[str, Any], result: RunResult, controls: dict[str, RunResult], folder: str) -> None:
    """Losses beside the controls, then what the client paid for them."""
    console, table = Console(soft_wrap=True), losses_table(summary, result, controls)
    # In a narrow window rich would cut the digits off; a line that wraps still has them.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    for label, value in cost_lines(summary):
        console.print(f"[bold]{label}[/bold]  {value}", highlight=False)
    console.print(f"[bold]run folder[/bold]  {folder}", highlight=False)


def losses_table(summary: dict[str, Any], result: RunResult, controls: dict[str, RunResult]) -> Table:
    """One row a run: validation metrics before → after."""
    names = sorted(result.last.metrics, key=lambda n: n != "val/loss")
    title = (
        f"{summary['algorithm']}: {summary['rounds']} rounds, {summary['clients_per_round']} of {summary['clients']} "
        f"clients, {summary['d_client']:,} client parameters; validation before → after"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("client", no_wrap=True)
    for name in names:
        table.add_column(name.removeprefix("val/").replace("_", " "), justify="right", no_wrap=True)
    rows = {summary["algorithm"]: result} | {f"{name} (control)": run for name, run in controls.items()}
    for label, run in rows.items():
        table.add_row(label, *(f"{run.first.metrics[n]:.4f} → {run.last.metrics[n]:.4f}" for n in names))
    return table


def cost_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands below the table."""
    lines = []
    if summary["controls"]:
        value = summary["gap_closed"]
        of = "(one seed; first order on the same weights)"
        shown = "no gap here (or a control is missing)" if value is None else f"{value:+.1%}  {of}"
        lines.append(("first-order gap recovered", shown))
    peak, forward = summary["client_peak_bytes"], summary["client_forward_bytes"]
    if peak is not None:
        lines.append(("client peak memory", f"{size(peak)} = {peak / forward:.2f} × a plain forward ({size(forward)})"))
    kinds = ", ".join(
        f"{kind.replace('_', ' ')} {size(value)}" for kind, value in summary["bytes_per_client_round"].items() if value
    )
    lines.append(("bytes per client and round", kinds))
    if summary["catch_up"]:
        chosen = ", ".join(f"{how} {count}" for how, count in sorted(summary["catch_up"].items()))
        lines.append(("returns of absent clients, by", chosen))
    if summary["refused"]:
        named = ", ".join(f"client {client} {count}" for client, count in summary["refused"].items())
        lines.append(("refused messages", named))
    if summary["seconds_per_round"] is not None:
        lines.append(("time per round", f"{summary['seconds_per_round']:.3f} s (median)"))
    return lines


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
