"""What a person at the server sees: who is there, and how far the run is."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.table import Table
from typing_extensions import override

#: Seconds between two lines where the output is no terminal.
EVERY = 60.0


class ServeConsole(ProgressBar):
    """A table that follows the run in a terminal; elsewhere one line a minute. What happens is said above it.

    Args:
        console: Where; None: the standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(soft_wrap=True, highlight=False)
        self._live: Live | None = None
        self._said = 0.0

    def notify(self, text: str) -> None:
        """Something happened."""
        self.console.print(f"{time.strftime('%H:%M:%S')}  {text}", markup=False)
        if self._live is not None:
            self._live.refresh()  # who is there has changed, perhaps

    def enable(self) -> None:
        """Nothing: it is on in the process that serves."""

    def disable(self) -> None:
        """Nothing."""

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The table appears."""
        if self.console.is_terminal:
            self._live = Live(get_renderable=lambda: table(trainer), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A round is over."""
        if self._live is not None:
            self._live.refresh()
        elif time.monotonic() > self._said + EVERY:
            self._said = time.monotonic()
            self.notify(", ".join(f"{name} {value}" for name, value in figures(trainer)))

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The table stays as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def table(trainer: Any) -> Table:
    """The figures, a column each."""
    shown = figures(trainer)
    drawn = Table(title=f"{trainer.algorithm.name}, run folder {trainer.log_dir}", title_justify="left")
    for name, _ in shown:
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_row(*(value for _, value in shown))
    return drawn


def figures(trainer: Any) -> list[tuple[str, str]]:
    """Names and values of what is shown."""
    metrics, there = trainer.callback_metrics, trainer.fleet.figures()
    late = int(there.get("late", 0) + there.get("missed", 0))
    shown = [("round", f"{trainer.global_step} of {trainer.max_steps}")]
    shown += [("clients", f"{len(trainer.fleet.connected)} of {trainer.datamodule.num_clients}")]
    for key, name in (
        ("train/loss", "train loss"),
        ("val/loss", "val loss"),
        ("val_clients/loss", "clients' val loss"),
    ):
        if key in metrics:
            shown.append((name, f"{float(metrics[key]):.4f}"))
    if "time/round_seconds" in metrics:
        shown.append(("seconds", f"{float(metrics['time/round_seconds']):.2f}"))
    traffic = (there.get("received_bytes", 0) + there.get("sent_bytes", 0)) / 2**20
    shown += [("MiB so far", f"{traffic:.1f}"), ("refused", str(trainer.run.refused.total())), ("late", str(late))]
    return shown
