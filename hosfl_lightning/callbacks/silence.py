"""User code that runs again reports nothing: its batch has been counted already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric, MetricCollection


@contextmanager
def replaced(function: Callable[..., Any], *places: tuple[object, str]) -> Iterator[None]:
    """Instance attributes that hide methods of the same name, until it is closed."""
    missing = object()
    saved = [vars(owner).get(name, missing) for owner, name in places]
    for owner, name in places:
        vars(owner)[name] = function
    try:
        yield
    finally:
        for (owner, name), value in zip(places, saved):
            if value is missing:
                del vars(owner)[name]
            else:
                vars(owner)[name] = value


def silenced(module: LightningModule) -> AbstractContextManager[None]:
    """While open, ``self.log``, ``self.log_dict`` and torchmetrics do nothing."""
    metrics = [m for m in module.modules() if isinstance(m, Metric | MetricCollection)]
    quiet = [(metric, name) for metric in metrics for name in ("update", "forward")]
    return replaced(lambda *_, **__: None, (module, "log"), *quiet)
