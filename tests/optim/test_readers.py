"""Who reads which parameters: looked up once, and again when the module is built otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hosfl_lightning.optim import ZerothOrder, together
from hosfl_lightning.optim.readers import Readers


def net() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))


def names(found: list[Any], module: nn.Module) -> dict[str, list[int]]:
    known = {id(m): name for name, m in module.named_modules()}
    return {known[id(reader)]: [number for number, _ in owned] for reader, owned in found}


def test_each_submodule_with_what_it_reads_itself() -> None:
    module = net()
    assert names(Readers(list(module.parameters())).of(module), module) == {"0": [0], "1.0": [1, 2], "2": [3, 4]}
    assert names(Readers(list(module.parameters()), {2, 3}).of(module), module) == {"1.0": [2], "2": [3]}


def swap(module: nn.Sequential) -> None:
    module[2] = nn.Linear(3, 2)


def tie(module: nn.Sequential) -> None:
    module[1].append(nn.Linear(3, 3))
    module[1][2].weight = module[1][0].weight


def untie(module: nn.Sequential) -> None:
    module[2].bias = None


@pytest.mark.parametrize(("change", "expected"), [
    (swap, {"0": [0], "1.0": [1, 2]}),
    (tie, {"0": [0], "1.0": [1, 2], "1.2": [1], "2": [3, 4]}),
    (untie, {"0": [0], "1.0": [1, 2], "2": [3]}),
])  # fmt: skip
def test_what_was_changed_since_is_seen(change: Callable[[nn.Sequential], None], expected: dict[str, Any]) -> None:
    module = net()
    readers = Readers(list(module.parameters()))
    readers.of(module)
    change(module)
    assert names(readers.of(module), module) == expected


def test_a_step_looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "FEW", 0)
    module, x = net(), torch.tensor([[1, 2], [3, 4]])
    optimizer = ZerothOrder(module.parameters(), module=module, probes=8)
    looked: list[nn.Module] = []
    look = Readers._look
    monkeypatch.setattr(Readers, "_look", lambda self, one: looked.append(one) or look(self, one))
    for _ in range(3):
        optimizer.step(lambda: module(x).square().sum())
    assert looked == [module]
    optimizer.probed = {0}
    optimizer.step(lambda: module(x).square().sum())
    assert looked == [module, module]
