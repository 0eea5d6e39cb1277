r"""What each client should gain, and which of them to take.

A trial of T rounds ends with the losses ``ℓ_b`` of held-out batches b. Against the frozen client's trial

    gain(T) = mean_b (ℓ_b,frozen − ℓ_b,client),    predicted for the R rounds of the recipe as
    gain(R) = gain(T) · s^{log₂(R / T)},    s = gain(T) / gain(T/2) of the strongest client, in [1/4, 1]

for a frozen client's server makes up for some of it later. The interval is a bootstrap over batches, paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.advise.gradients import interval, resamples

#: Part of the best gain that a client must reach, to be taken for what it saves.
PART = 2 / 3
#: Least of ``s``.
LEAST = 0.25
FREEZE = "freeze"


@dataclass(frozen=True)
class Finding:
    """What was measured of a candidate.

    Attributes:
        name: As in the table.
        backprop: Whether its client backpropagates.
        probes: ``P``; None: it does not probe.
        values: ``d_c``.
        gain: Predicted, nats: value, low and high; None: its trial diverged.
        share: Of the predicted decrease of one step that lies in what it trains: value, low and high.
        noise_scale: In examples; None: no signal is seen.
        cosine: Of its update with the gradient, as expected of P directions; None: it does not probe.
        measured_cosine: Of its first real update after the warm-up; None: that is not known.
        costs: As `hosfl_lightning.run.costs.client_costs`.
    """

    name: str
    backprop: bool
    probes: int | None
    values: int
    gain: tuple[float, float, float] | None
    share: tuple[float, float, float]
    noise_scale: float | None
    cosine: float | None
    measured_cosine: float | None
    costs: dict[str, Any]


def gains(frozen: Mapping[int, Tensor], curves: Mapping[str, Mapping[int, Tensor]], rounds: int) -> dict[str, Tensor]:
    """Predicted gains, ``(1 + resamples,)`` fp64 each, the first of all batches.

    Args:
        frozen: Losses of held-out batches by round, in the middle and at the end of the trial.
        curves: Of each candidate, likewise.
        rounds: ``R``.
    """
    middle, end = sorted(frozen)
    weight = resamples(len(frozen[end])).double()
    weight /= weight.sum(1, keepdim=True)
    later = {name: weight @ (frozen[end] - curve[end]) for name, curve in curves.items()}
    before = {name: weight @ (frozen[middle] - curve[middle]) for name, curve in curves.items()}
    if not later:
        return {}
    strongest = max(later, key=lambda name: float(later[name][0]))
    ratio = torch.where(before[strongest] > 0, later[strongest] / before[strongest], 1.0).clamp(LEAST, 1.0)
    return {name: gain * ratio ** max(math.log2(rounds / end), 0.0) for name, gain in later.items()}


def summed(values: Tensor) -> tuple[float, float, float]:
    """Value, low and high of what a bootstrap gave."""
    return (float(values[0]), *interval(values[1:]))


def choose(findings: Sequence[Finding]) -> str:
    """The name of the client to take, or `FREEZE`.

    It is the one that asks least of a device among those that gain at least `PART` of the best: rather no backprop,
    then fewer bytes, then less memory. To freeze it is where no gain, or no decrease below the cut, is told from zero.
    """
    told = [one for one in findings if one.gain is not None and one.gain[1] > 0]
    if not told or not any(one.share[1] > 0 for one in findings):
        return FREEZE
    best = max(one.gain[0] for one in told if one.gain)
    enough = [one for one in told if one.gain and one.gain[0] >= PART * best]
    return min(enough, key=asked).name


def asked(finding: Finding) -> tuple[Any, ...]:
    """What a candidate asks of a device, to be compared."""
    costs = finding.costs
    return finding.backprop, costs.get("up_per_client_round") or 0, costs.get("client_peak_bytes") or 0


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """By predicted gain, the best first; what diverged last."""
    return sorted(findings, key=lambda one: -math.inf if one.gain is None else one.gain[0], reverse=True)
