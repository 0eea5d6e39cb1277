"""Activation checkpointing of a half: what a user would try first when backprop does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hosfl_lightning.optim.compiled import eager


@contextmanager
def recomputing(half: nn.Module, active: bool = True) -> Iterator[None]:
    """While open, a forward keeps the input of each of ``half.layers``, which the backward runs again for its graph.

    The backward may come after it has closed; gradients have the bits that they have without it. The library's own
    switch (``gradient_checkpointing_enable``) works in train mode only, and a client half is in eval mode. Of a layer
    that overwrites its input there is nothing left to run again: the backward says so. A compiled half runs eagerly.

    Args:
        half: With ``layers``, its layers by number.
        active: False: nothing changes.
    """
    held: Any = half.layers if active else {}
    layers: list[Any] = list(held.values())
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        # Nothing in a half draws random numbers, so there is no state to put back.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        with eager(active):
            yield
    finally:
        for layer, forward in zip(layers, own):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
