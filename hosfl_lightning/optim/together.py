"""Probes of few parameters: ``θ + μ u`` in one piece, where hooks on every leaf would cost more than a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hosfl_lightning.optim.autocast import fresh_autocast
from hosfl_lightning.rng import DirectionBatch, Stream

FEW = 1 << 16
"""Elements that are moved at once: 256 KiB of saved bits and as much of ``θ + μ u``, in fp32."""
KEPT = 1 << 18
"""32-bit words of a round's directions that are kept, 1 MiB; a word has 32 elements (rademacher) or two (gauss16)."""


class Together:
    """Moves tensors all at once, whoever reads them; all clients of a round share its directions.

    A direction is generated once a round: what is kept of it is packed words, up to ``KEPT`` of them.

    Args:
        tensors: By number in the directions, of one dtype on one device.
    """

    def __init__(self, tensors: Mapping[int, nn.Parameter]) -> None:
        self.numbered = [(number, p.numel()) for number, p in tensors.items()]
        self.parameters = list(tensors.values())
        self.sizes = [size for _, size in self.numbered]
        self._round: Stream | None = None
        self._batches: dict[int, DirectionBatch] = {}

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
        moved = self._batch(stream).joined().mul_(scale).add_(saved)  # the product is exact: one rounding
        with fresh_autocast():
            try:
                torch._foreach_copy_(flat, moved.split(self.sizes))
                del moved
                yield
            finally:
                torch._foreach_copy_(flat, saved.split(self.sizes))

    def _batch(self, stream: Stream) -> DirectionBatch:
        of_round = replace(stream, probe=0)
        if self._round != of_round:
            self._round = of_round
            self._batches.clear()
        batch = self._batches.get(stream.probe)
        if batch is None:
            batch = DirectionBatch(stream, self.numbered, device=self.parameters[0].device)
            if (len(self._batches) + 1) * batch.words <= KEPT:
                self._batches[stream.probe] = batch
        return batch
