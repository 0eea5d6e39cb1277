"""What a server says to one client, as frames and without a server; and what its process holds. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from hosfl_client.messages import FRAMES, Multiplier, SmashedData
from hosfl_client.wire import ProjectedGradients, StepRequest, Terms, Update

RUN = bytes(range(16))
CLIENT = 2


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
        assert isinstance(z, SmashedData)
        values = np.random.default_rng(round).standard_normal((*z.mask.shape, z.z.width), np.float32) * 1e-3
        codec = self.terms.codecs["multiplier"]
        return FRAMES.encode(Multiplier.pack(round, CLIENT, values, z.mask, codec, self.terms.seed), RUN)

    def update(self, round: int, answer: bytes) -> bytes:
        """The answer's coefficients come back, as if the client were alone."""
        told: Any = FRAMES.decode(answer)
        values = told.coefficients if isinstance(told, ProjectedGradients) else told.unpack()
        record = Update(round, told.basis, values, self.terms.rule, round + 1, [CLIENT], [1.0], 1e-3)
        return FRAMES.encode(record, RUN)

    def ask(self, frame: bytes) -> bytes:
        """The client's one answer."""
        [answer] = self.joined.handle(frame)
        return answer


def memory() -> dict[str, int]:
    """Bytes: resident, most resident since `forget_peak`, and of the resident what no file is behind; Linux."""
    told = dict(re.findall(r"(VmRSS|VmHWM|RssAnon):\s+(\d+)", Path("/proc/self/status").read_text()))
    return {name: int(value) << 10 for name, value in told.items()}


def forget_peak() -> None:
    """`memory` counts from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def processor() -> float:
    """Seconds of this process, all threads."""
    times = os.times()
    return times.user + times.system
