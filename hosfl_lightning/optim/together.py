"""Probes of few parameters: ``θ + μ u`` in one piece, where hooks on every leaf would cost more than a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hosfl_lightning.optim.autocast import fresh_autocast
from hosfl_lightning.rng import DirectionBatch, Stream

FEW = 1 << 16
"""Elements that are moved at once: 256 KiB of saved bits and as much of ``θ + μ u``, in fp32."""


class Together:
    """Moves tensors all at once, whoever reads them.

    Args:
        tensors: By number in the directions, of one dtype on one device.
    """

    def __init__(self, tensors: Mapping[int, nn.Parameter]) -> None:
        self.numbered = [(number, p.numel()) for number, p in tensors.items()]
        self.parameters = list(tensors.values())
        self.sizes = [size for _, size in self.numbered]

    @staticmethod
    def of(tensors: Mapping[int, nn.Parameter]) -> Together | None:
        """None where they are many, none, or not of one kind."""
        alike = len({(p.dtype, p.device) for p in tensors.values()}) == 1
        return Together(tensors) if alike and sum(p.numel() for p in tensors.values()) <= FEW else None

    @contextmanager
    def perturbed(self, stream: Stream, scale: Tensor) -> Iterator[None]:
        """While open, ``θ' = cast(fp32(θ) + μ u)``; then θ has its saved bits again.

        Args:
            stream: Which direction ``u``.
            scale: 0-d fp32 tensor ``±μ``, rounded for the distribution.
        """
        # Made anew every time: a module that was moved or loaded has other memory under the same parameters.
        flat = [p.detach().view(-1) for p in self.parameters]
        saved = torch.cat(flat)
        u = DirectionBatch(stream, self.numbered, device=saved.device).joined()
        moved = u.mul_(scale).add_(saved)  # the product is exact: one rounding
        with fresh_autocast():
            try:
                torch._foreach_copy_(flat, moved.split(self.sizes))
                del u, moved
                yield
            finally:
                torch._foreach_copy_(flat, saved.split(self.sizes))
