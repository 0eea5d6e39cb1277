"""A half in PyTorch, as another engine would be written: the four methods, over the graph that is exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hosfl_client.half import Move
from hosfl_client.manifest import Manifest
from hosfl_lightning.device.export import _manifest, in_fp32
from hosfl_lightning.device.graph import Graph
from hosfl_lightning.device.samples import Samples
from hosfl_lightning.models import SplitModule

Array = np.ndarray[Any, Any]


class TorchHalf:
    """Of a model's client half.

    Attributes:
        manifest: As an export would have it.
    """

    def __init__(self, model: SplitModule) -> None:
        self.half, trained = in_fp32(model)
        self.trained = {name: tensor.clone().numpy() for name, tensor in trained.items()}
        self.graph = Graph(self.half, [*trained]).eval()
        batch = Samples(model).batch(2, 3)
        self._graph([*self.trained.values()], {name: tensor.numpy() for name, tensor in batch.items()})
        self.manifest: Manifest = _manifest(model, self.half, trained, self.graph.bottlenecks, Samples(model).image)
        self.moved: list[Array] | None = None

    def parameters(self) -> dict[str, Array]:
        return dict(self.trained)

    def forward(self, batch: Mapping[str, Array]) -> Array:
        return self.tapped(batch)[0]

    def tapped(self, batch: Mapping[str, Array]) -> tuple[Array, list[Array]]:
        z, *taps = self._graph(self.moved or [*self.trained.values()], batch)
        return z, taps

    @contextmanager
    def perturbed(self, move: Move) -> Iterator[None]:
        self.moved = [move(number, theta) for number, theta in enumerate(self.trained.values())]
        try:
            yield
        finally:
            self.moved = None

    @torch.no_grad()
    def _graph(self, theta: list[Array], batch: Mapping[str, Array]) -> list[Array]:
        inputs = [torch.from_numpy(batch[name]) for name in self.half.inputs]
        return [one.numpy() for one in self.graph([*map(torch.from_numpy, theta)], inputs)]
