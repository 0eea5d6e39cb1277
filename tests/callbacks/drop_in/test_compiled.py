"""In a compiled module no hook of a probe runs: all of it is moved at once, or, below a cut, it is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hosfl_lightning.callbacks import HybridOrder, ZerothOrderTraining
from hosfl_lightning.optim import SGD
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, Sequential, fit, hybrid, mlp, same_bits

# Dynamo looks at the gradient of what it is given.
pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a l")]


def compiled(part: Any) -> Any:
    return torch.compile(part, backend="eager")


def replace_forward(module: nn.Module) -> None:
    module.forward = compiled(module.forward)  # type: ignore[method-assign]


class Keeps(Sequential):
    """Runs a compiled twin of its network, which is no submodule."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        object.__setattr__(self, "fast", compiled(self.net))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.fast(batch[0]), batch[1])


class CallsItself(Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


class CompiledStep(Sequential):
    @compiled
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


def with_net(change: Callable[[Sequential], Any]) -> Callable[[], Sequential]:
    def make() -> Sequential:
        module = CallsItself(*mlp().net)
        change(module)
        return module

    return make


#: How it is compiled, and what the message names.
WAYS: dict[str, tuple[Callable[[], Sequential], str]] = {
    "wrapped": (with_net(lambda m: setattr(m, "net", compiled(m.net))), "'net' is compiled"),
    "in place": (with_net(lambda m: m.net.compile(backend="eager")), "'net' is compiled"),
    "a layer": (with_net(lambda m: m.net[0].compile(backend="eager")), r"'net\.0' is compiled"),
    "its forward": (with_net(lambda m: replace_forward(m.net)), "'net' is compiled"),
    "a twin": (lambda: Keeps(*mlp().net), "'net' is compiled"),
    "scripted": (with_net(lambda m: setattr(m, "net", torch.jit.script(m.net))), "'net' is compiled"),
    "all in place": (with_net(lambda m: m.compile(backend="eager")), "'CallsItself' is compiled"),
    "its step": (lambda: CompiledStep(*mlp().net), "'CompiledStep' is compiled"),
    "all": (lambda: compiled(mlp()), "a compiled LightningModule runs no hooks"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_below_a_cut_nothing_may_be_compiled(way: str) -> None:
    make, message = WAYS[way]
    with pytest.raises(ValueError, match=message) as refused:
        fit(make(), hybrid())
    assert r"docs/drop_in.md" in str(refused.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "all"])
def test_a_compiled_module_is_trained_by_forwards(way: str) -> None:
    fast, plain = WAYS[way][0](), mlp()
    for module in (fast, plain):
        fit(module, ZerothOrderTraining(SGD(lr=0.1)))
    torch.testing.assert_close(list(fast.parameters()), list(plain.parameters()))


def test_a_compiled_lightning_module_is_not() -> None:
    with pytest.raises(ValueError, match=WAYS["all"][1]):
        fit(WAYS["all"][0](), ZerothOrderTraining())


def test_the_way_to_compile_the_upper_part_only() -> None:
    fast, plain = mlp(), mlp()
    for layer in fast.net[2:]:  # from the cut on
        layer.compile(backend="eager")
    fast.loss, fast.more = compiled(cross_entropy), compiled(fast.configure_optimizers)  # helpers are no matter
    for module in (fast, plain):
        fit(module, HybridOrder("net.2", SGD(lr=0.1)), max_epochs=2)
    assert same_bits(fast, plain)
