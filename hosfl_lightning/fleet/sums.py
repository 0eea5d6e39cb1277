"""What a round's backward passes add up to, the same bits in one process and in several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


class LocalSums:
    """`hosfl_lightning.server.server.Sums` of one process: autograd adds up the gradients itself.

    Args:
        parameters: θ_s.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.loss = torch.zeros((), device=parameters[0].device)

    def total(self, terms: Sequence[int]) -> int:
        """``Σ_k n_k``."""
        return sum(terms)

    def add(self, loss: Tensor | None) -> None:
        """``Σ += w_k ℓ_k``."""
        if loss is not None:
            self.loss = self.loss + loss

    def finish(self) -> Tensor:
        """``Σ_k w_k ℓ_k``."""
        return self.loss


class RankSums(LocalSums):
    """`hosfl_lightning.server.server.Sums` over processes.

    The i-th groups of all processes are neighbours in client order, so they are exchanged together, and a process holds
    one gradient of each other at a time. They are added one after the other: a reduction would choose its own order.
    Where no group so far has a gradient, there is none, as with autograd: an optimizer tells that from zero.

    Args:
        parameters: θ_s.
        share: Of plain values with all processes.
        gather: The tensors of all processes, in their order.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        share: Callable[[Any], list[Any]],
        gather: Callable[[Tensor], list[Tensor]],
    ) -> None:
        super().__init__(parameters)
        self.parameters, self.share, self.gather = parameters, share, gather
        self.gradients: list[Tensor | None] = [None] * len(parameters)
        self.awaited = 0

    @override
    def total(self, terms: Sequence[int]) -> int:
        told = self.share([*terms])
        self.awaited = max(map(len, told))
        return sum(map(sum, told))

    @override
    def add(self, loss: Tensor | None) -> None:
        self.awaited -= 1
        told = self.share([None if loss is None else float(loss), [p.grad is not None for p in self.parameters]])
        parts = self.gather(torch.cat([_gradient_bytes(p) for p in self.parameters]))
        for (value, present), part in zip(told, parts):
            super().add(None if value is None else self.loss.new_tensor(value))
            self._take(part, present)
        for parameter in self.parameters:
            parameter.grad = None

    @override
    def finish(self) -> Tensor:
        while self.awaited:  # others have a group more
            self.add(None)
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return self.loss

    def _take(self, part: Tensor, present: list[bool]) -> None:
        for i, (parameter, piece) in enumerate(zip(self.parameters, part.split([p.nbytes for p in self.parameters]))):
            if present[i]:
                gradient, known = piece.clone().view(parameter.dtype).view_as(parameter), self.gradients[i]
                self.gradients[i] = gradient if known is None else known.add_(gradient)


def _gradient_bytes(parameter: nn.Parameter) -> Tensor:
    # As bytes: parameters may be of several dtypes.
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().flatten().view(torch.uint8)
