"""The advice as people read it: a table, and what follows from it in a few sentences."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hosfl_lightning.advise.measurement import Measurement
from hosfl_lightning.advise.ranking import FREEZE, PART, Finding, ranked
from hosfl_lightning.run.summary import size

SIMULATED = (
    "A diagnosis in simulation: it backpropagates through the client's half and holds all clients' data, which no "
    "device of the method does."
)


def print_advice(found: Measurement, choice: str) -> None:
    """The table, then the sentences."""
    console, made = Console(soft_wrap=True), table(found)
    console.width = max(console.width, console.measure(made, options=console.options.update(width=1000)).maximum)
    console.print(made)
    for line in sentences(found, choice):
        console.print(line, highlight=False)


def table(found: Measurement) -> Table:
    """A row a client, the best predicted gain first."""
    made = Table(
        title=f"{found.rounds} rounds of each client, {found.batches} batches; gain predicted for {found.planned} "
        "rounds, held-out loss",
        title_justify="left",
    )
    made.add_column("client", no_wrap=True)
    for head in ("trains", "gain", "share below cut", "cosine", "sends, receives", "memory, forwards"):
        made.add_column(head, justify="right", no_wrap=True)
    for one in ranked(found.findings):
        gain = "diverged" if one.gain is None else _gain(one.gain)
        share = f"{_percent(one.share[0])} [{_percent(one.share[1])}, {_percent(one.share[2])}]"
        made.add_row(one.name, f"{one.values:,}", gain, share, _cosine(one), _travels(one.costs), _asks(one.costs))
    made.add_row(FREEZE, "0", "0", "", "", _travels(found.frozen_costs), _asks(found.frozen_costs))
    return made


def sentences(found: Measurement, choice: str) -> list[str]:
    """What to take, why, and what is unsure."""
    told = {one.name: one for one in found.findings}
    lines = [_freeze(found) if choice == FREEZE else _take(found, told[choice])]
    lines.append(_noise(found))
    lines.append(
        f"Unsure: one seed, the recipe's rates as they are; the intervals are of batches. A gain is of "
        f"{found.rounds} rounds, carried on to {found.planned}. {SIMULATED}"
    )
    return lines


def _take(found: Measurement, one: Finding) -> str:
    assert one.gain is not None
    best = next(other for other in ranked(found.findings) if other.gain is not None)
    assert best.gain is not None
    line = f"Take {one.name}: it should end {_gain(one.gain)} below a frozen client ({found.loss:.3f} after the trial)"
    if best is not one:
        line += f", {one.gain[0] / best.gain[0]:.0%} of what {best.name} should gain, and asks less of a device"
    line += f"; {_percent(_widest(found).share[0])} of the predicted decrease of a step lies below the cut."
    if one.backprop:
        line += f" No client without backprop reaches {PART:.0%} of that"
        others = [other for other in ranked(found.findings) if not other.backprop and other.gain is not None]
        line += f": {others[0].name} {_gain(others[0].gain)}." if others and others[0].gain else "."
    return line


def _freeze(found: Measurement) -> str:
    share = _widest(found).share
    if not share[1] > 0:
        return (
            f"Freeze the client: the share of a step's decrease below the cut, {_percent(share[0])} "
            f"[{_percent(share[1])}, {_percent(share[2])}], is not told from zero; move the cut deeper if the client "
            "is to learn."
        )
    return (
        "Freeze the client: no client's gain is told from zero at these rates; try the recipe's client_optimizer at "
        "others before you give it up, or a deeper cut."
    )


def _widest(found: Measurement) -> Finding:
    """The one below whose parameters most of the decrease lies."""
    return max(found.findings, key=lambda one: (one.share[0] == one.share[0], one.share[0]))


def _noise(found: Measurement) -> str:
    told = (
        "not told: no mean gradient is seen"
        if found.noise_scale is None
        else f"{found.noise_scale:.0f} examples at the server"
    )
    widest = _widest(found).noise_scale
    client = "" if widest is None else f", {widest:.0f} at the client"
    return f"Noise scale: {told}{client}; a round has {found.examples:.0f}."


def _gain(gain: tuple[float, float, float]) -> str:
    value, low, high = gain
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _percent(share: float) -> str:
    return "–" if share != share else f"{share:.0%}"


def _cosine(one: Finding) -> str:
    """As expected, then as measured."""
    known = "" if one.measured_cosine is None else f"{one.measured_cosine:.3f}"
    return known if one.cosine is None else f"{one.cosine:.3f}, seen {known or '–'}"


def _travels(costs: dict[str, Any]) -> str:
    kinds = costs["bytes_per_client_round"]
    up = costs["up_per_client_round"]
    return f"{size(up)}, {size(sum(kinds.values()) - up)}"


def _asks(costs: dict[str, Any]) -> str:
    peak, forwards = costs["client_peak_bytes"], costs["client_forwards_per_round"]
    return "" if peak is None else f"{size(peak)}, {forwards:.1f}"
