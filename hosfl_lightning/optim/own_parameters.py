"""What clients train that each keeps for itself: the parameters beside their moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import override

from hosfl_lightning.optim.moments import Moments, Slots
from hosfl_lightning.optim.zeroth_order import ZerothOrder

#: Among the moments of a parameter: its values, flat, in its dtype.
THETA = "theta"


class OwnParameters(Moments):
    """``θ_k`` and its moments by client. Of a client that has not moved nothing is kept: it holds the start.

    Between clients the parameters are those of the start, whose bits nothing changes.

    Args:
        optimizer: Over the parameters that each client has for itself.
    """

    def __init__(self, optimizer: ZerothOrder) -> None:
        super().__init__(optimizer)
        self.start = [p.data for p in optimizer.parameters]

    def holding(self, client: int) -> AbstractContextManager[None]:
        """The parameters are that client's inside, to be read."""
        values = self.values(client)
        return swapped([(self.optimizer.parameters[i], theta) for i, theta in values.items()])

    def values(self, client: int) -> dict[int, Tensor]:
        """``θ_k`` by the numbers of the parameters; empty: the client holds the start."""
        slots = self.held.get(client, (0, {}))[1]
        return {i: held[THETA].view_as(self.start[i]) for i, held in slots.items()}

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (THETA, *super().names)

    @property
    @override
    def fresh(self) -> Slots:
        return {i: {THETA: theta.view(-1)} for i, theta in enumerate(self.start)}

    @override
    def _take(self) -> Slots:
        moments = super()._take()
        return {i: {THETA: p.data.view(-1), **moments.get(i, {})} for i, p in enumerate(self.optimizer.parameters)}

    @override
    def _put(self, steps: int, slots: Slots) -> None:
        moments = {i: {name: t for name, t in held.items() if name != THETA} for i, held in slots.items()}
        super()._put(steps, {i: held for i, held in moments.items() if held})
        for i, (parameter, start) in enumerate(zip(self.optimizer.parameters, self.start)):
            parameter.data = slots[i][THETA].view_as(start) if i in slots else start
        torch.clear_autocast_cache()


@contextmanager
def swapped(pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Parameters have other values inside. Nothing is copied, and a graph through them is still good afterwards."""
    pairs = list(pairs)
    before = [(parameter, parameter.data) for parameter, _ in pairs]
    try:
        for parameter, values in pairs:
            parameter.data = values
        yield
    finally:
        for parameter, values in before:
            parameter.data = values
        torch.clear_autocast_cache()
