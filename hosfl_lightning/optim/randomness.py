"""The same dropout masks and norm statistics at ``θ``, ``θ + μu`` and ``θ − μu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hosfl_lightning.optim.submodules import submodules

T = TypeVar("T")


class SameRandomness:
    """Remember torch's random state now; every function called through this starts from it and leaves no trace.

    A difference of two evaluations under different dropout masks measures the masks. Probes must not move running
    statistics either. The state is that of the CPU and of ``device``, both.

    Example::

        same = SameRandomness(model, device)
        loss = closure()                       # an ordinary forward: advances the random state, moves the statistics
        moved = same(closure)                  # the same masks; random state and statistics stay where they were
    """

    def __init__(self, module: nn.Module | None, device: torch.device) -> None:
        self.norms = [m for m in submodules(module) if isinstance(m, _NormBase) and m.training] if module else []
        self.devices = [device] if device.type == "cuda" else []
        self.cpu_state = torch.random.get_rng_state()
        self.device_states = [torch.cuda.get_rng_state(d) for d in self.devices]

    def __call__(self, function: Callable[[], T]) -> T:
        """What ``function`` returns from the remembered state, without autograd."""
        with torch.random.fork_rng(self.devices), torch.no_grad():
            torch.random.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.device_states):
                torch.cuda.set_rng_state(state, device)
            saved = [(buffer, buffer.clone()) for norm in self.norms for buffer in norm.buffers()]
            try:
                return function()
            finally:
                for buffer, value in saved:
                    buffer.copy_(value)


class Evaluations:
    """``f`` of one step, which leaves its trace once, however often it is evaluated.

    The first call is an ordinary one: it advances the random state, moves norm statistics, and logs. Every other one
    starts from the state of the first and leaves nothing.

    Args:
        same: Made before the first call.
        first: ``f``.
        again: The same without what it reports; default: ``first``.
    """

    def __init__(
        self, same: SameRandomness, first: Callable[[], Tensor], again: Callable[[], Tensor] | None = None
    ) -> None:
        self.same, self.first, self.again = same, first, again or first
        self.begun = False

    def __call__(self) -> Tensor:
        """``f`` at the parameters as they are now."""
        if self.begun:
            return self.same(self.again)
        self.begun = True
        return self.first()
