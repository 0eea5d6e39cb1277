"""What a server says to one client, as frames and without a server; and what its process holds and takes. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hosfl_client.messages import FRAMES, Multiplier
from hosfl_client.wire import ProjectedGradients, StepRequest, Terms, Update

RUN = bytes(range(16))
CLIENT = 2
#: Seconds, more than those after which a client gives back what forwards have kept.
PAUSE = 1.3
TEXT = "the quick brown fox jumps over the lazy dog; " * 80


class Script:
    """A round is three frames: `step`, `multiplier`, `update`; λ is normal, and small.

    Args:
        terms: Of the run.
        joined: A `hosfl_client.joined.Joined` or the one of PyTorch, which takes the terms at once.
    """

    def __init__(self, terms: Terms, joined: Any) -> None:
        self.terms, self.joined = terms, joined
        joined.handle(FRAMES.encode(terms, RUN))

    def step(self, round: int) -> bytes:
        """Begins a round."""
        return FRAMES.encode(StepRequest(round, CLIENT), RUN)

    def multiplier(self, round: int, answer: bytes) -> bytes:
        """λ for the z of an answer."""
        z: Any = FRAMES.decode(answer, "smashed_data")
        values = np.random.default_rng(round).standard_normal((*z.mask.shape, z.z.width), np.float32) * 1e-3
        codec = self.terms.codecs["multiplier"]
        return FRAMES.encode(Multiplier.pack(round, CLIENT, values, z.mask, codec, self.terms.seed), RUN)

    def update(self, round: int, answer: bytes) -> bytes:
        """The answer's coefficients come back, as if the client were alone."""
        told: Any = FRAMES.decode(answer)
        values = told.coefficients if isinstance(told, ProjectedGradients) else told.unpack()
        return FRAMES.encode(Update(round, told.basis, values, self.terms.rule, round + 1, [CLIENT], [1.0], 1e-3), RUN)

    def ask(self, frame: bytes) -> bytes:
        """The client's one answer."""
        answer: bytes
        [answer] = self.joined.handle(frame)
        return answer


def memory() -> dict[str, int]:
    """Bytes: resident, most resident since `forget_peak`, and of the resident what no file is behind; Linux."""
    told = dict(re.findall(r"(VmRSS|VmHWM|RssAnon):\s+(\d+)", Path("/proc/self/status").read_text()))
    return {name: int(value) << 10 for name, value in told.items()}


def forget_peak() -> None:
    """`memory` counts from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def held(script: Script, repeats: int) -> dict[str, Any]:
    """What is resident while a client waits, long enough, and the peak of a round; medians, in bytes."""
    rounds: list[dict[str, int]] = []
    for round in range(repeats):
        time.sleep(PAUSE)
        idle = memory()["VmRSS"]
        forget_peak()
        multiplier = script.multiplier(round, script.ask(script.step(round)))
        time.sleep(PAUSE)
        waits = memory()["VmRSS"]
        update = script.update(round, script.ask(multiplier))
        script.joined.handle(update)
        rounds.append({"idle": idle, "waits": waits, "peak": memory()["VmHWM"]})
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def took(script: Script, repeats: int, alone: Callable[[], object] | None = None) -> dict[str, float]:
    """Seconds of processor time, medians: of a round, of its three parts, and of ``alone``, which runs in between."""
    rounds: list[list[float]] = []
    beside: list[float] = []
    for round in range(repeats + 1):
        if alone is not None:
            beside.append(seconds(alone)[0])
        sent, answer = seconds(lambda: script.ask(script.step(round)))  # noqa: B023  # it is called at once
        multiplier = script.multiplier(round, answer)
        answered, answer = seconds(lambda: script.ask(multiplier))  # noqa: B023
        update = script.update(round, answer)
        moved, _ = seconds(lambda: script.joined.handle(update))  # noqa: B023
        rounds.append([sent, answered, moved])
    rounds, beside = rounds[1:], beside[1:]
    found = {name: median(parts) for name, parts in zip(("sent", "answered", "moved"), zip(*rounds))}
    found["round"] = median(map(sum, rounds))
    if alone is not None:
        found["alone"] = median(beside)
        found["ratio"] = median(sum(parts) / other for parts, other in zip(rounds, beside))
    return found


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Of this process's processor time, and what the call returned."""
    begin = time.process_time()
    found = call()
    return time.process_time() - begin, found
