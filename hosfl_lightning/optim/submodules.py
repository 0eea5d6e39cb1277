"""The submodules of a module, without their names."""

from __future__ import annotations

from torch import nn


def submodules(module: nn.Module) -> list[nn.Module]:
    """Those of `nn.Module.modules`, each once; no names are made, which take most of its time."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [module]
    while left:
        one = left.pop()
        if one is not None and one not in found:
            found[one] = None
            left += one._modules.values()
    return list(found)
