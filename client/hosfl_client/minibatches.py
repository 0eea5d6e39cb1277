"""The minibatch of a round: a pure function of the data, its seed and the round, as of a client in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hosfl_client.bfloat16 import Array
from hosfl_client.examples import DataSettings, Example
from hosfl_client.rng import Domain, permutation
from hosfl_client.wire.coded import IGNORE_INDEX


@dataclass(frozen=True)
class Minibatch:
    """What the half takes, and what travels beside z.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask (B, S)`` int64, or ``pixel_values (B, C, H, W)`` fp32.
        labels: ``(B, S)`` or ``(B,)`` int64.
        num_terms: ``n_k``, the loss terms.
    """

    inputs: dict[str, Array]
    labels: Array
    num_terms: int

    @property
    def terms(self) -> Array:
        """``n_i``, the loss terms of each example."""
        if self.labels.ndim == 1:
            return np.ones(len(self.labels), np.int64)
        return np.asarray((self.labels[:, 1:] != IGNORE_INDEX).sum(1))

    def mask(self, positions: int) -> Array:
        """Positions of z that count, ``(B, S)`` bool; of an image all do."""
        if "attention_mask" in self.inputs:
            return self.inputs["attention_mask"].astype(bool)
        return np.ones((len(self.labels), positions), bool)


class Minibatches:
    """Round r is batch ``r mod ⌊n/b⌋`` of epoch ``r div ⌊n/b⌋``, in the epoch's order; b = min(batch_size, n).

    Args:
        examples: All of the client's.
        settings: Batch size, seed, padding, pixels' scale.
    """

    def __init__(self, examples: Sequence[Example], settings: DataSettings) -> None:
        self.examples, self.settings = examples, settings
        self.size = min(settings.batch_size, len(examples))
        self._order: tuple[int, Array] = (-1, np.empty(0, np.int64))

    def __call__(self, step: int) -> Minibatch:
        """The minibatch of a local step, counted over all rounds."""
        epoch, batch = divmod(step, len(self.examples) // self.size)
        if self._order[0] != epoch:
            n, seed = len(self.examples), self.settings.seed
            self._order = epoch, permutation(n, seed, Domain.DATA_ORDER, round=epoch, client=0)
        chosen = self._order[1][batch * self.size : (batch + 1) * self.size]
        return collate([self.examples[i] for i in chosen], self.settings)


def collate(examples: Sequence[Example], settings: DataSettings) -> Minibatch:
    """Padded on the right to the longest; images scaled and normalised."""
    if settings.kind == "images":
        labels = np.array([example.labels for example in examples], np.int64)
        return Minibatch({"pixel_values": _pixels(examples, settings)}, labels, len(labels))
    shape = len(examples), max(len(example.values) for example in examples)
    ids, mask = np.full(shape, settings.pad, np.int64), np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.values)], mask[row, : len(example.values)] = example.values, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if settings.kind == "labelled":
        return Minibatch(inputs, np.array([example.labels for example in examples], np.int64), shape[0])
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    for row, example in enumerate(examples):
        labels[row, : len(example.labels)] = example.labels
    return Minibatch(inputs, labels, int((labels[:, 1:] != IGNORE_INDEX).sum()))


def _pixels(examples: Sequence[Example], settings: DataSettings) -> Array:
    shape = (settings.channels, *examples[0].values.shape[1:])
    scaled = np.stack([np.broadcast_to(e.values.astype(np.float32) / np.float32(255), shape) for e in examples])
    mean, std = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (settings.mean, settings.std))
    return (scaled - mean) / std
