"""The exact gradient of what leads straight to the smashed data, without a graph through anything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

#: Elements of input that are differentiated at a time, and into how many parts a smaller input is cut.
ELEMENTS, PARTS = 1 << 18, 8
#: Positions that are not cut further: a smaller matrix product is no cheaper.
POSITIONS = 64


def add_local_gradient_(totals: Sequence[Tensor], module: nn.Module, inputs: Tensor, cotangent: Tensor) -> None:
    r"""``G_i += ∂⟨λ, m(h; θ)⟩/∂θ_i``: the gradient of ``⟨λ, z⟩`` when ``z = … + m(h; θ)``, chunk by chunk, in place.

    No graph leaves ``m``: whatever computed ``h`` is not differentiated, and one chunk's graph lives at a time.

    Args:
        totals: ``G_i`` fp32, one for each of ``module.parameters()``, of its shape.
        module: ``m``, of each position alone; of each example alone where ``h`` is a map.
        inputs: ``h``: ``(B, S, d)``, ``(B, d)`` or a map ``(B, d, H, W)``.
        cotangent: ``λ (B, S', h)``, of the shape of ``m``'s output.
    """
    names = [name for name, _ in module.named_parameters()]
    weights = [p.detach().requires_grad_() for p in module.parameters()]
    for part, factor in _chunks(inputs, cotangent):
        with torch.enable_grad():
            output = functional_call(module, dict(zip(names, weights)), (part,))
        for total, gradient in zip(totals, torch.autograd.grad(output, weights, factor.to(output.dtype))):
            total += gradient


def _chunks(inputs: Tensor, cotangent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    least = 1
    if inputs.ndim == 3:  # positions are independent: each becomes an example of one
        inputs, cotangent, least = inputs.flatten(0, 1)[:, None], cotangent.flatten(0, 1)[:, None], POSITIONS
    width = max(least, min(ELEMENTS // inputs[0].numel(), -(-len(inputs) // PARTS)))
    return zip(inputs.split(width), cotangent.split(width))
