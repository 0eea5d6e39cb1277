"""The control that backpropagates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hosfl_lightning.clients.base import Anchor, SplitClient
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.recompute import recomputing
from hosfl_lightning.optim import Basis, ZerothOrder


class FirstOrderClient(SplitClient):
    r"""``∇_θ ⟨λ_k, f_c(x_k; θ_c)⟩`` by backprop, the gradient that a forward-only client estimates.

    Keeps the graph of its half while it waits for λ. Everything else, the rule included, is as in the forward-only
    client, so that the two differ in the gradient alone.

    Args:
        half: ``f_c``.
        optimizer: Holds θ_c; only its rule is used.
        checkpointing: Keep the input of each layer instead of its graph, and run it once more in the backward.

    Reference: SplitFed, arXiv 2004.12088, with gradients averaged every step.
    """

    def __init__(self, half: nn.Module, optimizer: ZerothOrder, checkpointing: bool = False) -> None:
        super().__init__(half, optimizer)
        self.checkpointing = checkpointing
        for parameter in optimizer.parameters:
            parameter.requires_grad_(True)

    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """``z = f_c(x; θ_c)`` and the graph of each client's own examples."""
        with torch.enable_grad(), recomputing(self.half, self.checkpointing):
            graphs = [self.evaluate({name: tensor[r] for name, tensor in batch.items()}) for r in rows]
        return Anchor(torch.cat([z.detach() for z in graphs]), graphs)

    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """``(K, d_c)``: each client's dense gradient, flattened in manifest order."""
        parameters = self.optimizer.parameters
        answers = []
        for z, r in zip(anchor.graphs, rows):
            gradients = torch.autograd.grad(z, parameters, multiplier[r].to(z.dtype), materialize_grads=True)
            answers.append(basis.project(gradients))
        return torch.stack(answers)
