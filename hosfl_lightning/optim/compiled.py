"""Modules that `torch.compile` or `torch.jit` has taken: hooks that come later do not run in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

#: Where a compiled function keeps the one that it was made of.
ORIGINAL = "_torchdynamo_orig_callable"
#: Methods that run a module; a compiled helper beside them, such as a loss, is no matter.
RUNS = ("forward", "training_step", "__call__")


def compiled_around(module: nn.Module, names: Iterable[str]) -> str | None:
    """The dotted name of the first compiled submodule that holds one of these submodules or parameters.

    Args:
        module: The root; it counts as well, its name is ``""``.
        names: Dotted, in the root.
    """
    names = list(names)
    places = {id(part): name for name, part in module.named_modules()}
    for part in module.modules():
        for target in _compiled(part):
            place = places.get(id(target))
            if place is not None and any(inside.startswith(f"{place}." if place else "") for inside in names):
                return place
    return None


def eager(active: bool = True) -> AbstractContextManager[object]:
    """While open, what is compiled runs as it was written, hooks and all; in every thread of the process."""
    return torch.compiler.set_stance("force_eager") if active else nullcontext()


def _compiled(module: nn.Module) -> Iterator[nn.Module]:
    """What is compiled of a module: itself, in place or by a wrapper, or another one that it keeps so."""
    if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
        yield module
    if any(hasattr(getattr(module, name, None), ORIGINAL) for name in RUNS[:2]):
        yield module
    for value in vars(module).values():
        original: Any = getattr(value, ORIGINAL, None) if callable(value) else None
        owner = getattr(original, "__self__", None)
        if isinstance(owner, nn.Module) and getattr(original, "__name__", None) in RUNS:
            yield owner
