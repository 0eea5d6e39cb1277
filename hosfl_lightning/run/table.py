"""The table that people read at the end of a run: losses beside the controls, and what each client paid for them."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hosfl_lightning.run.summary import size

#: Of the kinds of messages, those that a newcomer knows by another name.
WORDS = {
    "smashed_data": "z", "multiplier": "λ", "projected_gradients": "its answer",
    "unlabelled_data": "z₁", "middle_output": "z₂", "output_multiplier": "λ₂",
}  # fmt: skip
#: How names end that say something over clients, which have a line of their own.
OVER_CLIENTS = ("_worst", "_std")
#: Of a control without a name of its own.
TITLES = {"frozen": "frozen (control)", "first_order": "first order (control)"}


def print_table(summary: dict[str, Any], folder: str) -> None:
    """One row a client, then in words what each of them sent and needed."""
    console, table = Console(soft_wrap=True), losses_table(summary)
    # In a narrow window rich would cut the digits off; a line that wraps still has them.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    for label, value in [*cost_lines(summary), ("run folder", folder)]:
        console.print(f"[bold]{label}[/bold]  {value}", highlight=False)


def losses_table(summary: dict[str, Any]) -> Table:
    """The validation metrics before the first round and, for each client, after the last."""
    found = (name for name in summary["metrics_last"] if not name.endswith(OVER_CLIENTS))
    names = sorted(found, key=lambda name: name != "val/loss")
    title = (
        f"{summary['algorithm']}: {summary['rounds']} rounds, {summary['clients_per_round']} of {summary['clients']} "
        "clients; validation"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("client", no_wrap=True)
    for head in (*(name.removeprefix("val/").replace("_", " ") for name in names), "gap closed", "sends", "memory"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_row("before", *(_number(summary["metrics_first"][name]) for name in names), "", "", "", end_section=True)
    for label, run in runs(summary).items():
        metrics = (_number(run["metrics_last"][name]) for name in names)
        table.add_row(label, *metrics, _share(run["gap_closed"]), _sent(run), _needed(run))
    return table


def runs(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The run and its controls, by what the table calls them."""
    controls = {TITLES.get(name, name): run for name, run in summary["controls"].items()}
    own = f"{summary['algorithm']}, {summary['adapter']}" if summary["trains"] else summary["algorithm"]
    return {own: summary} | controls


def cost_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands below the table: the gap, a line a client, and what happened on the way."""
    lines = [("gap closed", _gap_in_words(summary))] if summary["controls"] else []
    lines += [(label, _in_words(run)) for label, run in runs(summary).items()]
    if "val/loss_worst" in summary["metrics_last"]:
        lines.append(("clients, each by its own half", "; ".join(map(_spread, runs(summary).items()))))
    if summary["catch_up"]:
        chosen = ", ".join(f"{how} {count}" for how, count in sorted(summary["catch_up"].items()))
        lines.append(("returns of absent clients, by", chosen))
    if summary["refused"]:
        named = ", ".join(f"client {client} {count}" for client, count in summary["refused"].items())
        lines.append(("refused messages", named))
    if summary["seconds_per_round"] is not None:
        lines.append(("time per round", f"{summary['seconds_per_round']:.3f} s (median)"))
    return lines


def _gap_in_words(summary: dict[str, Any]) -> str:
    missing = [name for name in ("frozen", "first_order") if name not in summary["controls"]]
    if missing:
        return f"not known without the control {' and '.join(missing)}"
    if summary["gap_closed"] is None:
        return "none to close: the frozen and the first-order client end at the same loss, within their noise"
    return "0 % the frozen client, 100 % the first-order one, in validation loss; one seed"


def _in_words(run: dict[str, Any]) -> str:
    """What the client trains, runs, keeps in memory and sends."""
    parts = [f"trains {run['d_client']:,} numbers ({run['adapter']})" if run["trains"] else "trains nothing"]
    if run["client_forwards_per_round"] is not None:
        parts.append(f"computes {run['client_forwards_per_round']:.1f} forwards a round")
    if run["client_peak_bytes"] is not None:
        peak, forward = run["client_peak_bytes"], run["client_forward_bytes"]
        parts.append(f"peaks at {size(peak)}, {peak / forward:.2f} x a plain forward")
    sent = {kind: value for kind, value in run["bytes_per_client_round"].items() if value}
    named = ", ".join(f"{WORDS.get(kind, kind.replace('_', ' '))} {size(value)}" for kind, value in sent.items())
    return "; ".join([*parts, f"a round: {named}"])


def _spread(row: tuple[str, dict[str, Any]]) -> str:
    """The worst client, and the deviation over clients."""
    label, metrics = row[0], row[1]["metrics_last"]
    names = [name.removesuffix("_worst") for name in metrics if name.endswith("_worst")]
    told = (
        f"{name.removeprefix('val/').replace('_', ' ')} {_number(metrics[f'{name}_worst'])} at worst, deviation "
        f"{_number(metrics[f'{name}_std'])}"
        for name in sorted(names, key=lambda name: name != "val/loss")
    )
    return f"{label}: {', '.join(told)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.0%}"  # no -0%


def _sent(run: dict[str, Any]) -> str:
    return size(run["up_per_client_round"])


def _needed(run: dict[str, Any]) -> str:
    return "" if run["client_peak_bytes"] is None else size(run["client_peak_bytes"])
