"""Create the panels of a run in a W&B project: losses, client signals, bytes, memory, time.

Command, after ``pip install -e '.[dashboard]'`` and ``wandb login``:
``python tools/wandb_dashboard.py --entity ME --project hosfl``. It saves a new view of the project and touches no run;
``--dry-run`` prints the view and sends nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


@dataclass(frozen=True)
class Panel:
    """One line plot; several keys share its axis, so they share a unit."""

    title: str
    unit: str
    keys: tuple[str, ...]


CLIENT = [
    Panel("Projected gradient, rms", "nats / unit", ("client/projected_gradient_rms",)),
    Panel("Multiplier, norm", "nats / activation", ("client/multiplier_norm",)),
    Panel("Lagrangian term", "nats", ("client/lagrangian_term",)),
    Panel("Learning rate", "", ("client/lr",)),
]
#: Of an Orchestrator's run. Controls are runs of its group (docs/wandb.md), so a panel has a line a run and key.
ROUNDS: dict[str, list[Panel]] = {
    "Loss, beside the controls": [
        Panel("Validation loss", "nats", ("val/loss",)),
        Panel("Training loss", "nats", ("train/loss",)),
    ],
    "Client": [
        *CLIENT,
        Panel("Cosine with the gradient", "", ("alignment/cosine",)),
        Panel("Decrease by each half", "nats", ("alignment/client_decrease", "alignment/server_decrease")),
    ],
    "Bytes": [
        Panel("Up and down, a round", "bytes", ("comm/up_bytes", "comm/down_bytes")),
        Panel("z and λ, a round", "bytes", ("comm/smashed_data_bytes", "comm/multiplier_bytes")),
        Panel("Scalars and update, a round", "bytes", ("comm/projected_gradients_bytes", "comm/update_bytes")),
        Panel("Since the first round", "bytes", ("comm/total_bytes",)),
    ],
    "Memory": [
        Panel("Client: peak, plain forward", "bytes", ("memory/client_peak_bytes", "memory/client_forward_bytes")),
        Panel("Client: waiting for λ", "bytes", ("memory/client_waiting_bytes",)),
        Panel("Server: peak", "bytes", ("memory/server_peak_bytes",)),
    ],
    "Time": [
        Panel("A round", "s", ("time/round_seconds",)),
        Panel("A client's part", "s", ("time/client_seconds",)),
        Panel("A client's part, in plain forwards", "forwards", ("compute/client_forwards",)),
    ],
}
#: Of a plain Trainer's run with HybridOrder and PeakMemoryMonitor; the losses are the module's own, under its names.
TRAINER: dict[str, list[Panel]] = {
    "Below the cut": CLIENT,
    "Memory": [
        Panel("Parameters and optimizer", "bytes", ("memory/static_bytes",)),
        Panel("A step", "bytes", ("memory/step_working_bytes", "memory/lower_working_bytes")),
    ],
}


def workspace(entity: str, project: str, trainer: bool = False) -> Workspace:
    """The view, not saved yet.

    Args:
        entity: User or team.
        project: Of the runs.
        trainer: They are runs of a plain Trainer.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    x_axis, parts = ("trainer/global_step", TRAINER) if trainer else ("round", ROUNDS)

    def plot(panel: Panel) -> Any:
        return wr.LinePlot(title=panel.title, x=x_axis, y=list(panel.keys), title_y=panel.unit)

    sections = [ws.Section(name=name, panels=list(map(plot, part)), is_open=True) for name, part in parts.items()]
    settings = ws.WorkspaceSettings(x_axis=x_axis)
    return ws.Workspace(entity=entity, project=project, name="HO-SFL", sections=sections, settings=settings)


def main(args: list[str] | None = None) -> None:
    """Save the view, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="hosfl")
    parser.add_argument("--trainer", action="store_true", help="for runs of a plain Trainer with HybridOrder")
    parser.add_argument("--dry-run", action="store_true", help="print the view as W&B would get it")
    given = parser.parse_args(args)
    view = workspace(given.entity, given.project, given.trainer)
    if given.dry_run:
        print(json.dumps(view._to_model().spec.model_dump(mode="json", exclude_none=True), indent=2))
    else:
        view.save()


if __name__ == "__main__":
    main()
