"""``table.md``: the results for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hosfl_lightning.rendering import listed
from hosfl_lightning.run.summary import size

NONE = "–"
PUT_BACK = "test loss, client put back"


def columns(results: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """How well a method does, by the head of a table."""
    split, metric, target = results["evaluated_on"], results["metric"], results["target"]
    extra = {f"{split} {metric}": lambda row: pm(row[metric])} if metric else {}
    put_back = {PUT_BACK: lambda row: pm(row["client_put_back"])} if _put_back(results) else {}
    reached = f"rounds to val {target['metric']} {target['value']:.4f}" if target else "rounds to target"
    return {
        f"{split} loss": lambda row: pm(row["loss"]),
        **extra,
        "gap closed": lambda row: share(row["gap_closed"]),
        "frozen − this": lambda row: pm(row["below_frozen"], sign=True),
        **put_back,
        reached: lambda row: rounds(row["rounds_to_target"]),
    }


def cost_columns(results: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """At what learning rates, and what a client pays for it."""
    return {
        "learning rates": point,
        "rounds": lambda row: number(row.get("rounds"), "{:,.0f}"),
        "client trains": lambda row: number(row.get("d_client"), "{:,.0f}"),
        "client peak": lambda row: sized(row.get("client_peak_bytes")),
        "client time / round": lambda row: number(row.get("client_seconds_per_round"), "{:.3f} s"),
        "client forwards / round": lambda row: number(row.get("client_forwards_per_round"), "{:.1f}"),
    }


def sent_columns(results: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """What travels, and the arithmetic of all clients."""
    return {
        "up / client-round": lambda row: sized(row.get("bytes_up_per_client_round")),
        "down / client-round": lambda row: sized(row.get("bytes_down_per_client_round")),
        "up in total": lambda row: sized(row.get("bytes_up")),
        "down in total": lambda row: sized(row.get("bytes_down")),
        "client forwards in total": lambda row: number(row.get("client_forwards"), "{:,.0f}"),
    }


#: The tables; each has seven columns at most, so that a page can show it.
TABLES = (columns, cost_columns, sent_columns)


def markdown(results: dict[str, Any]) -> str:
    """The tables, what they leave out, and how they were made."""
    parts = [*(_grid(results, shown(results)) for shown in TABLES), "\n".join(notes(results))]
    return "\n\n".join(parts) + "\n"


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and body of one wide table."""
    shown = {head: cell for table in TABLES for head, cell in table(results).items()}
    return ["method", *shown], [_cells(name, row, shown) for name, row in results["methods"].items()]


def notes(results: dict[str, Any]) -> list[str]:
    """What stands below the tables, a line each."""
    made, methods = results["made"], results["methods"]
    lines = [
        "Mean ± standard deviation over seeds. *gap closed*: (frozen − this) / (frozen − first order) in "
        f"{results['evaluated_on']} loss, on paired means over seeds, with a 95 % bootstrap interval over seeds. "
        "*client forwards*: arithmetic of a client, in plain forwards of its half.",
    ]
    if _put_back(results):
        lines.append(
            f"*{PUT_BACK}*: server as trained, client half as it was before the first round: how far the server relies "
            "on the client's change, not what the client contributed. For this column alone the test set is touched "
            "once more."
        )
    if results["evaluated_on"] == "validation":
        lines.append("**On the validation set**: not every run has touched a test set.")
    if any(row.get("edge") for row in methods.values()):
        lines.append("† at the edge of its grid, which has more than two values there: one beyond it might be better.")
    reasons: dict[str, list[str]] = {}
    for name, row in methods.items():
        if row["no_gap_closed"] and row["seeds"]:
            reasons.setdefault(f"No gap closed ({row['no_gap_closed']})", []).append(name)
        for seed, reason in row["failed"].items():
            reasons.setdefault(f"**Failed** under seed {seed} ({reason})", []).append(name)
        for tried in row.get("failed_points", ()):
            reasons.setdefault(f"**Failed** at {_named(tried['point'])} ({tried['reason']})", []).append(name)
    lines += [f"{reason}: {listed(names)}." for reason, names in reasons.items()]
    lines += [f"{note}." for note in (results["no_target"], *results.get("notes", ())) if note]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return [f"- {line}" for line in (*lines, f"{made['date']}; `{made['command']}`", made["machine"], versions)]


def pm(value: dict[str, Any] | None, sign: bool = False) -> str:
    """``mean ± sd``."""
    if value is None or value["mean"] is None:
        return NONE
    shown = f"{value['mean']:+.4f}" if sign else f"{value['mean']:.4f}"
    return shown if value["sd"] is None else f"{shown} ± {value['sd']:.4f}"


def share(gap: dict[str, Any] | None) -> str:
    """Per cent, with the interval."""
    return NONE if gap is None else f"{gap['value']:.0%} [{gap['low']:.0%}, {gap['high']:.0%}]"


def rounds(reached: dict[str, Any] | None) -> str:
    """The mean, or how many seeds came so far."""
    if reached is None:
        return NONE
    if reached["mean"] is None:
        return f"{reached['reached']} of {len(reached['values'])} seeds"
    return f"{reached['mean']:.0f}"


def point(row: dict[str, Any]) -> str:
    """The chosen grid point, marked if it lies at the edge."""
    chosen = row.get("point")
    return NONE if chosen is None else _named(chosen) + (" †" if row["edge"] else "")


def sized(value: float | None) -> str:
    """Bytes."""
    return NONE if value is None else size(value)


def number(value: float | None, form: str) -> str:
    """A number, if there is one."""
    return NONE if value is None else form.format(value)


def _put_back(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [row["client_put_back"] for row in results["methods"].values() if row["client_put_back"]]


def _named(point: dict[str, Any]) -> str:
    return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in point.items()) or "the recipe's"


def _cells(name: str, row: dict[str, Any], shown: dict[str, Callable[[dict[str, Any]], str]]) -> list[str]:
    return [name, *(cell(row) if row["seeds"] else NONE for cell in shown.values())]


def _grid(results: dict[str, Any], shown: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    body = [_cells(name, row, shown) for name, row in results["methods"].items()]
    for line, row in zip(body, results["methods"].values()):
        line[1] = line[1] if row["seeds"] else "failed"
    return "\n".join([_line(["method", *shown]), _line(["---", *["---:"] * len(shown)]), *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
