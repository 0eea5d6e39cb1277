from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import local_gradient
from hosfl_lightning.optim.local_gradient import add_local_gradient_
from hosfl_lightning.split.side import Bottleneck

#: Shapes of h and of z without the examples: tokens, one vector, a map, and one that is pooled.
SHAPES = {
    "tokens": ((50, 12), (50, 9)), "vector": ((12,), (9,)), "map": ((12, 5, 4), (9, 5, 4)),
    "pooled": ((12, 6, 4), (9, 3, 2)), "3x3": ((12, 6, 4), (9, 3, 2)),
}  # fmt: skip
EXAMPLES = 7


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def setting(kind: str) -> tuple[Bottleneck, Tensor, Tensor]:
    """A bottleneck that is not at its start, its input, and λ as the client holds it."""
    given, wanted = SHAPES[kind]
    module = Bottleneck(given, wanted, 3, kernel=3 if kind == "3x3" else 1)
    module.down.weight.data, module.up.weight.data = normal(*module.down.weight.shape, seed=0), normal(9, 3, seed=1)
    h = normal(EXAMPLES, *given, seed=2)
    with torch.no_grad():
        q = module(h)
    return module, h, normal(*q.shape, seed=3)


def gradient(module: nn.Module, h: Tensor, multiplier: Tensor) -> list[Tensor]:
    totals = [torch.zeros_like(p) for p in module.parameters()]
    add_local_gradient_(totals, module, h, multiplier)
    return totals


def backprop(module: nn.Module, h: Tensor, multiplier: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((module(h) * multiplier).sum(), [*module.parameters()])


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("elements", "parts", "positions"), [(1 << 18, 8, 64), (1, 1000, 1), (40, 3, 2), (1 << 20, 1, 1)]
)
def test_it_is_the_gradient_whatever_the_chunks(
    kind: str, elements: int, parts: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ELEMENTS": elements, "PARTS": parts, "POSITIONS": positions}.items():
        monkeypatch.setattr(local_gradient, name, value)
    module, h, multiplier = setting(kind)
    for got, expected in zip(gradient(module, h, multiplier), backprop(module, h, multiplier), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_it_is_added_to_what_is_there() -> None:
    module, h, multiplier = setting("tokens")
    totals = [torch.ones_like(p) for p in module.parameters()]
    add_local_gradient_(totals, module, h, multiplier)
    for total, expected in zip(totals, backprop(module, h, multiplier)):
        torch.testing.assert_close(total, 1 + expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_graph_enters_or_leaves_it(frozen: bool) -> None:
    module, h, multiplier = setting("tokens")
    module.requires_grad_(not frozen)
    h.requires_grad_()
    with torch.no_grad():
        totals = gradient(module, h, multiplier)
        assert not torch.is_grad_enabled()
    assert all(total.grad_fn is None for total in totals)
    assert h.grad is None
    assert all(p.grad is None and p.requires_grad != frozen for p in module.parameters())


def test_from_bf16_it_is_that_of_the_same_numbers_in_fp32() -> None:
    module, h, multiplier = setting("tokens")
    h, multiplier = h.bfloat16(), multiplier.bfloat16()
    for got, expected in zip(gradient(module, h, multiplier), gradient(module, h.float(), multiplier.float())):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("examples", [1, 8])
def test_the_scratch_is_a_chunks(dtype: torch.dtype, examples: int) -> None:
    """Of however few examples the positions are."""
    module = Bottleneck((0, 128), (0, 128), 8)
    h = normal(examples, 4096 // examples, 128, seed=0).to(dtype)
    with MemoryMeter() as meter, meter.role("vjp"):
        gradient(module, h, h)
    assert meter.peak("vjp") < 0.7 * 4 * h.numel()
