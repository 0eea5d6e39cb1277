"""The control that backpropagates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hosfl_lightning.clients.base import Batch, Client
from hosfl_lightning.optim import Basis, ZerothOrder


class FirstOrderClient(Client):
    r"""``∇_θ ⟨λ_k, f_c(x_k; θ_c)⟩`` by backprop, the gradient that a forward-only client estimates.

    Keeps the graph of its half while it waits for λ. Everything else, the rule included, is as in the forward-only
    client, so that the two differ in the gradient alone.

    Args:
        half: ``f_c``.
        optimizer: Holds θ_c; only its rule is used.

    Reference: SplitFed, arXiv 2004.12088, with gradients averaged every step.
    """

    def __init__(self, half: nn.Module, optimizer: ZerothOrder) -> None:
        super().__init__(half, optimizer)
        for parameter in optimizer.parameters:
            parameter.requires_grad_(True)
        self._held: list[Tensor] = []

    def forward(self, batch: Batch, rows: list[slice]) -> Tensor:
        """``z = f_c(x; θ_c)``; the graph of each client's own examples is kept here until `answer`."""
        with torch.enable_grad():
            self._held = [self._evaluate({name: tensor[r] for name, tensor in batch.items()}) for r in rows]
        return torch.cat([z.detach() for z in self._held])

    def answer(self, batch: Batch, z: Tensor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """``(K, d_c)``: each client's dense gradient, flattened in manifest order."""
        parameters = self.optimizer.parameters
        held, self._held = self._held, []
        answers = []
        for kept, r in zip(held, rows):
            gradients = torch.autograd.grad(kept, parameters, multiplier[r].to(kept.dtype), materialize_grads=True)
            answers.append(basis.project(gradients))
        return torch.stack(answers)
