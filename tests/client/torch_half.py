"""A half in PyTorch, as another engine would be written: the four methods, over the graph that is exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hosfl_client.half import Move
from hosfl_client.head_file import head_from
from hosfl_client.manifest import Manifest
from hosfl_lightning.device.export import _manifest, in_fp32
from hosfl_lightning.device.graph import Graph
from hosfl_lightning.device.head import described, head_of
from hosfl_lightning.device.samples import Samples
from hosfl_lightning.models import SplitModule

Array = np.ndarray[Any, Any]


class TorchHalf:
    """Of a model's client half.

    Attributes:
        manifest: As an export would have it.
    """

    def __init__(self, model: SplitModule) -> None:
        self.half, self.below = in_fp32(model)
        trained = {**self.below, **head_of(model)}
        self.trained = {name: tensor.clone().numpy() for name, tensor in trained.items()}
        self.head, told = None, None
        if model.labels == "client":
            told, arrays = described(model)
            frozen = {name: tensor.numpy() for name, tensor in arrays.items()}
            self.head = head_from(told, {**frozen, **self.trained}, [self.trained[name] for name in head_of(model)])
        self.graph = Graph(self.half, [*self.below]).eval()
        batch = Samples(model).batch(2, 3)
        self._graph(self._theta(), {name: tensor.numpy() for name, tensor in batch.items()})
        made = _manifest(model, self.half, trained, self.graph.bottlenecks, Samples(model).image)
        self.manifest: Manifest = replace(made, head=told)
        self.moved: list[Array] | None = None

    def parameters(self) -> dict[str, Array]:
        return dict(self.trained)

    def forward(self, batch: Mapping[str, Array]) -> Array:
        return self.tapped(batch)[0]

    def tapped(self, batch: Mapping[str, Array]) -> tuple[Array, list[Array]]:
        z, *taps = self._graph(self.moved or self._theta(), batch)
        return z, taps

    @contextmanager
    def perturbed(self, move: Move) -> Iterator[None]:
        self.moved = [move(number, theta) for number, theta in enumerate(self._theta())]
        try:
            yield
        finally:
            self.moved = None

    def _theta(self) -> list[Array]:
        return [self.trained[name] for name in self.below]

    @torch.no_grad()
    def _graph(self, theta: list[Array], batch: Mapping[str, Array]) -> list[Array]:
        inputs = [torch.from_numpy(batch[name]) for name in self.half.inputs]
        return [one.numpy() for one in self.graph([*map(torch.from_numpy, theta)], inputs)]
