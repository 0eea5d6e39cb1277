"""User code that runs again reports nothing: its batch has been counted already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric, MetricCollection

from hosfl_lightning.optim.submodules import submodules


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


@contextmanager
def silenced(module: LightningModule) -> Iterator[None]:
    """While open, ``self.log``, ``self.log_dict`` and torchmetrics do nothing.

    A metric that is called gives what it gave last, since user code may compute with it.
    """
    parts = submodules(module)
    kinds = {kind for kind in {type(m) for m in parts} if issubclass(kind, (Metric, MetricCollection))}
    metrics = [m for m in parts if type(m) in kinds]
    with ExitStack() as quiet:
        quiet.enter_context(replaced(_nothing, (module, "log"), *((metric, "update") for metric in metrics)))
        for metric in metrics:
            if isinstance(metric, Metric):  # a collection calls its own
                quiet.enter_context(replaced(partial(_last_value, metric), (metric, "forward")))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _last_value(metric: Metric, *_: Any, **__: Any) -> Any:
    return metric._forward_cache
