"""The client that trains on its own, through an auxiliary head, and sends the server z on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.objective import ObjectiveClient
from hosfl_lightning.clients.recompute import recomputing
from hosfl_lightning.optim import Dense, SharedDirections
from hosfl_lightning.optim.sphere import sphere_difference
from hosfl_lightning.split import run


class AuxiliaryHalf(nn.Module):
    """``f_a(f_c(x; θ_c); θ_a)``: all that a client holds of such a method.

    Args:
        client_half: ``f_c``.
        head: ``f_a``, from ``z (B, S, h)`` and ``attention_mask (B, S)`` to logits.
    """

    def __init__(self, client_half: Any, head: nn.Module) -> None:
        super().__init__()
        self.client_half, self.auxiliary = client_half, head
        #: What it takes of a batch.
        self.inputs = tuple(dict.fromkeys([*client_half.inputs, "attention_mask"]))

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The half's and the head's, by their number in the whole model."""
        return {**self.client_half.layers, **getattr(self.auxiliary, "layers", {})}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """``z (B, S, h)`` and the head's logits, of what ``inputs`` names."""
        batch = dict(zip(self.inputs, inputs, strict=True))
        z = run(self.client_half, batch)
        return z, self.auxiliary(z, batch["attention_mask"])


class AuxiliaryClient(ObjectiveClient):
    r"""``F(θ) = ℓ(f_a(f_c(x; θ_c); θ_a), y)`` over ``θ = (θ_c, θ_a)``, and z, which the same forward gives.

    Args:
        half: An `AuxiliaryHalf`.
        optimizer: Holds θ_c, then θ_a.
        loss: ``ℓ``, the mean over the loss terms, of logits and labels.
        backprop: Whether it does; otherwise nothing in it asks for a graph.
        checkpointing: Keep each layer's input instead of its graph, and run it twice.
    """

    half: AuxiliaryHalf

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``z (B, S, h)`` without a graph, and ``F(θ)``, 0-d, with one for a client that backpropagates."""
        with torch.enable_grad(), recomputing(self.half, self.checkpointing):
            z, logits = self.evaluate(batch)
            return z.detach(), self.loss(logits, batch["labels"])

    def objective(self, batch: Batch) -> Tensor:
        """``F(θ)``, 0-d."""
        return self.forward(batch)[1]

    def backward(self, loss: Tensor) -> None:
        """``θ ← rule(θ, ∇F)``; the graph of ``loss`` is freed."""
        parameters = self.optimizer.parameters
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        basis = Dense([p.numel() for p in parameters])
        self.optimizer.record(basis.project(gradients), basis)
        self.optimizer.step()

    def probe(self, batch: Batch, base: Tensor, directions: SharedDirections, mu: float) -> Tensor:
        """``(P,)`` coefficients of the estimate of ``∇F`` along unit-sphere directions; ``P`` forwards.

        Args:
            batch: As given to `forward`.
            base: ``F(θ)``.
            directions: gauss16, before they are scaled to length 1.
            mu: ``μ``, the length of the step on the sphere.
        """
        return sphere_difference(lambda: self.objective(batch), self.optimizer, directions, mu, base)

    def align(self, batch: Batch, z: Tensor, multiplier: Tensor, steps: int, lr: float) -> None:
        r"""``θ_a ← θ_a − lr ∇_{θ_a} ‖∇_z ℓ(f_a(z; θ_a), y) − λ‖²``, ``steps`` times; θ_c does not move.

        Args:
            batch: Whose z it is.
            z: ``(B, S, h)``, as `forward` gave it.
            multiplier: ``λ (B, S, h)``, zero at padding.
            steps: How often.
            lr: Its learning rate.
        """
        trained = [p for p in self.half.auxiliary.parameters() if p.requires_grad]
        # No fused attention has a second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for _ in range(steps):
                gap = self.misalignment(batch, z, multiplier)
                gradients = torch.autograd.grad(gap, trained, materialize_grads=True)
                with torch.no_grad():
                    for parameter, gradient in zip(trained, gradients):
                        parameter.copy_(parameter.float() - lr * gradient.float())
                torch.clear_autocast_cache()  # it keeps casts of the weights before the step

    def misalignment(self, batch: Batch, z: Tensor, multiplier: Tensor) -> Tensor:
        """``‖∇_z ℓ(f_a(z; θ_a), y) − λ‖²``, 0-d, fp32, with a graph; arguments as in `align`."""
        z = z.detach().requires_grad_()
        # A view: torch's FLOP counter cannot follow a module that is given a leaf.
        loss = self.loss(self.half.auxiliary(z.view_as(z), batch["attention_mask"]), batch["labels"])
        [gradient] = torch.autograd.grad(loss, z, create_graph=True)
        return (gradient.float() - multiplier.float()).square().sum()
