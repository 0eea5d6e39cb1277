"""What is remembered of a batch: how it passed the cut, and the call that can be made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hosfl_lightning.optim.randomness import SameRandomness


@dataclass
class Replay:
    """A call of user code that can be made again.

    Args:
        function: The call.
        same: The random state that it met.
        calls: How often the cut had been called before it.
    """

    function: Callable[[], Any]
    same: SameRandomness
    calls: int = 0


@dataclass
class BatchState:
    """One micro-batch on its way.

    Attributes:
        replay: Gives z again.
        anchor: z where the upper part starts; its ``.grad`` will be λ.
        running: The calls around the cut that have not ended.
        calls: Of the cut by the user's step, with or without a graph.
        passes: Of these, with one.
        skipped: How many calls of the cut without a graph come first in the replay.
    """

    replay: Replay | None = None
    anchor: Tensor | None = None
    running: list[tuple[nn.Module, Replay]] = field(default_factory=list)
    calls: int = 0
    passes: int = 0
    skipped: int = 0
