"""The one graph that is made below a cut: where its tensors are kept, and what arrives at its leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.callbacks.drop_in.cut_check import CutError


@contextmanager
def graph_below(below: Callable[[], bool], keep: bool) -> Iterator[None]:
    """While open, what autograd saves below the cut is in host memory, or nowhere: then a graph can only be walked.

    Args:
        below: Whether the cut is still to come; what is saved after it stays where it is.
        keep: The graph will be differentiated.
    """

    def pack(tensor: Tensor) -> Any:
        if not below():
            return tensor
        return (tensor.device, tensor.cpu()) if keep else None

    def unpack(packed: Any) -> Tensor:
        if packed is None:
            raise CutError("cut: training_step itself differentiates what is below the cut, which has no graph after "
                           "the first batch; choose an earlier cut")  # fmt: skip
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class ArrivingGradients:
    """``∂ℓ/∂θ`` as backprop brings it, moved to host memory at once: nobody finds a ``.grad``.

    Args:
        parameters: θ.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._arrived: dict[int, Tensor] = {}
        self.handles = [p.register_post_accumulate_grad_hook(self._take) for p in parameters]

    def _take(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._arrived[id(parameter)], parameter.grad = parameter.grad.cpu(), None

    def clear(self) -> None:
        """A new backward begins."""
        self._arrived.clear()

    def remove(self) -> None:
        """Gradients stay where autograd puts them from now on."""
        self.clear()
        for handle in self.handles:
            handle.remove()

    @property
    def values(self) -> list[Tensor]:
        """One for each parameter, zero where none arrived."""
        return [self._arrived.get(id(p), torch.zeros_like(p, device="cpu")) for p in self.parameters]
