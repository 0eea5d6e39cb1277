"""The entry point of a run whose clients are on other machines."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ProgressBar

from hosfl_lightning.availability import Always
from hosfl_lightning.callbacks import GradientAlignment, ServeConsole
from hosfl_lightning.clients.own_state import KEPT
from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.loggers import CSVLogger
from hosfl_lightning.models import SplitModule
from hosfl_lightning.run import folder
from hosfl_lightning.run.serving import ServedData, Serving


def serve(trainer: Any, serving: Serving, model: SplitModule, data: FederatedDataModule, run: str | None) -> None:
    """See `hosfl_lightning.Orchestrator.serve`.

    Args:
        trainer: The orchestrator.
        serving: Where the clients come in.
        model: The cut model.
        data: What the server validates on.
        run: The run's folder, or None.

    Raises:
        ValueError: A setting that only a simulation can have.
    """
    _check(trainer, serving)
    if model.labels == "client" and serving.validate != "server":
        raise ValueError("--validate: the clients keep their labels, so what they hold out is not sent; take server")
    # Every client's batch is its own there, and a round is tried until it succeeds.
    trainer.settings = replace(trainer.settings, simulation="per_client", on_too_few="repeat")
    goes_on = run is not None and (Path(run) / folder.IDENTITY).is_file()
    if run is not None and trainer.loggers:
        # Named the same at its beginning and when it goes on: ModelCheckpoint compares its folder's name.
        here = Path(run if Path(run).is_absolute() else os.path.relpath(run))
        others = [logger for logger in trainer.loggers if not isinstance(logger, CSVLogger)]
        trainer.loggers = [CSVLogger(str(here.parent), name="", version=here.name), *others]
    _show(trainer, serving)
    serving.open()
    trainer.serving, over = serving, False
    try:
        trainer.fit(model, ServedData(data, serving.gate.names), run if goes_on else None)
        over = True
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"interrupted; {_how_to_go_on(trainer.log_dir, run)}",)
        raise
    finally:
        trainer.serving = None
        if "fleet" in vars(trainer):
            trainer.fleet.close("the run is over" if over else "the server stops; it may come back", over)
        serving.close()


def _how_to_go_on(log_dir: str, run: str | None) -> str:
    if not (Path(log_dir) / folder.IDENTITY).is_file():
        return "no round had begun: start it anew"
    return "the same command goes on" if run is not None else f"the same command with --run={log_dir} goes on"


def _show(trainer: Any, serving: Serving) -> None:
    """A console in the place of the bar, where a bar is wanted; it also says what happens."""
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
    if bars:
        console = next((bar for bar in bars if isinstance(bar, ServeConsole)), ServeConsole())
        trainer.callbacks = [console if callback is bars[0] else callback for callback in trainer.callbacks]
        serving.notify = console.notify


def _check(trainer: Any, serving: Serving) -> None:
    settings = trainer.settings
    if settings.world_size > 1:
        raise ValueError(
            "trainer.devices, trainer.num_nodes: a server of clients elsewhere is one process; set both to 1"
        )
    if trainer.algorithm.personal:
        raise ValueError(
            "trainer.algorithm.init_args.personal: clients on other machines cannot keep a half of their own yet; "
            "leave it out, or run a simulation (hosfl fit)"
        )
    if settings.controls:
        raise ValueError(
            "trainer.controls would run every round again on every device; set it to [], and compare in a simulation "
            "with the same settings (hosfl fit)"
        )
    if not isinstance(settings.availability, Always):
        raise ValueError("trainer.availability is of simulated clients; leave it out: real ones are there or are not")
    if any(isinstance(callback, GradientAlignment) for callback in trainer.callbacks):
        raise ValueError("trainer.callbacks: GradientAlignment needs the clients' data, which is not here; remove it")
    if not trainer.algorithm.keeps and settings.val_check_interval > KEPT:
        warnings.warn(
            f"trainer.val_check_interval is {settings.val_check_interval}, the rounds between checkpoints; the clients "
            f"of {trainer.algorithm.name} keep their moments of {KEPT}, and may lose them when this server is killed: "
            f"set it to {KEPT} at most",
            stacklevel=2,
        )
    quorum = serving.membership.quorum
    if quorum is not None and quorum < settings.min_clients:
        raise ValueError(
            f"--quorum is {quorum}, but trainer.min_clients is {settings.min_clients}, so no round would succeed; "
            "raise the one or lower the other"
        )
    if serving.validate != "server" and not trainer.algorithm.keeps:
        raise ValueError(
            f"--validate: between rounds the clients of {trainer.algorithm.name} do not hold the run's weights; take "
            "server"
        )
