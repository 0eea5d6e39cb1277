"""The client that has a loss of its own: the whole model, or its half with an auxiliary head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.clients.base import Client, freeze
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.recompute import recomputing
from hosfl_lightning.optim import Dense, ZerothOrder
from hosfl_lightning.split import run


class WholeModel(nn.Module):
    """``f_s(f_c(x; θ_c); θ_s)``, from inputs to logits, at one place: what a client holds of a method without a cut.

    Args:
        client_half: ``f_c``.
        server_half: ``f_s``.
    """

    def __init__(self, client_half: nn.Module, server_half: nn.Module) -> None:
        super().__init__()
        self.client_half, self.server_half = client_half, server_half
        taken: Any = client_half.inputs
        #: Of a batch.
        self.inputs: tuple[str, ...] = tuple(dict.fromkeys([*taken, "attention_mask"]))

    @property
    def layers(self) -> dict[int, nn.Module]:
        """Of both halves, by number."""
        lower: Any = self.client_half.layers
        upper: Any = self.server_half.layers
        return {**lower, **upper}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits, of what `inputs` names."""
        batch = dict(zip(self.inputs, inputs, strict=True))
        return self.server_half(run(self.client_half, batch), batch["attention_mask"])


class ObjectiveClient(Client):
    r"""``ℓ(f(x; θ), y)`` and, by backprop, its gradient.

    Args:
        half: ``f``, from a batch to logits.
        optimizer: Holds what is trained of it.
        loss: ``ℓ``, the mean over the loss terms, of logits and labels.
        backprop: Whether it does; otherwise it is evaluated only, and nothing in it asks for a graph.
        checkpointing: Keep each layer's input instead of its graph, and run it twice.
    """

    def __init__(
        self,
        half: nn.Module,
        optimizer: ZerothOrder,
        loss: Callable[[Tensor, Tensor], Tensor],
        backprop: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(half, optimizer)
        freeze(half)
        for parameter in optimizer.parameters if backprop else ():
            parameter.requires_grad_(True)
        self.loss, self.checkpointing = loss, checkpointing

    def objective(self, batch: Batch) -> Tensor:
        """``ℓ``, 0-d; with a graph where one is recorded."""
        return self.loss(self.evaluate(batch), batch["labels"])

    def descend(self, batch: Batch) -> Tensor:
        """``θ ← rule(θ, ∇ℓ)``; the loss before, detached."""
        parameters = self.optimizer.parameters
        with torch.enable_grad(), recomputing(self.half, self.checkpointing):
            loss = self.objective(batch)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        basis = Dense([p.numel() for p in parameters])
        self.optimizer.record(basis.project(gradients), basis)
        self.optimizer.step()
        return loss.detach()


def whole_model(model: Any, settings: dict[str, Any]) -> tuple[WholeModel, dict[str, nn.Parameter]]:
    """`Endpoint.hold` of a method without a cut: both halves, both trained, the client's first."""
    halves = {"client_half": model.client_parameters, "server_half": model.server_parameters}
    named = {f"{half}.{name}": p for half, of_half in halves.items() for name, p in of_half.items()}
    return WholeModel(model.client_half, model.server_half), named
