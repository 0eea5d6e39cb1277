from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import ZerothOrder, together
from hosfl_lightning.optim.together import Together
from hosfl_lightning.rng import DISTRIBUTIONS, Stream, direction, round_coefficient

SHAPES = [(16, 8), (3, 5), (1,), (128,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def stream_of(distribution: str = "rademacher", **place: Any) -> Stream:
    return replace(Stream(5, DISTRIBUTIONS[distribution], round=2, probe=1), **place)


def scale_of(distribution: str = "rademacher") -> Tensor:
    return torch.tensor(round_coefficient(0.013, DISTRIBUTIONS[distribution]), dtype=torch.float32)


def expected(held: list[nn.Parameter], numbers: list[int], stream: Stream, scale: Tensor) -> list[Tensor]:
    moved = []
    for number, p in zip(numbers, held):
        u = direction(stream, number, 0, p.numel()).view(p.shape)
        moved.append(torch.addcmul(p.detach().float(), u, scale).to(p.dtype))
    return moved


def inside(plan: Together, held: list[nn.Parameter], stream: Stream, scale: Tensor) -> list[Tensor]:
    with plan.perturbed(stream, scale):
        return [p.detach().clone() for p in held]


def same(a: list[Tensor], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_tensor_is_moved_by_the_sum_in_fp32_cast_once_and_put_back(dtype: torch.dtype, distribution: str) -> None:
    held, numbers, scale = parameters(dtype), [0, 3, 4, 9], scale_of(distribution)
    held[0].data.view(torch.uint8).view(-1)[:4] = 0xFF  # a NaN with bits of its own
    before, stream = [p.detach().clone() for p in held], stream_of(distribution)
    plan = Together(dict(zip(numbers, held)))
    wanted = expected(held, numbers, stream, scale)

    def fail() -> None:
        assert same([p.nan_to_num() for p in held], [w.nan_to_num() for w in wanted])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), plan.perturbed(stream, scale):
        fail()
    assert same([p.detach().view(torch.uint8) for p in held], [b.view(torch.uint8) for b in before])


def test_a_kept_direction_is_never_another_ones() -> None:
    held = parameters()
    plan, scale = Together(dict(enumerate(held))), scale_of()
    others = ({"probe": 2}, {"round": 3}, {"client": 0}, {"seed": 6}, {"first_tensor": 1})
    for place in (place for other in others for place in ({}, other)):
        stream = stream_of(**place)
        assert same(inside(plan, held, stream, scale), expected(held, [0, 1, 2, 3], stream, scale)), place


def test_what_has_changed_since_the_last_probe_is_seen() -> None:
    net = nn.Linear(3, 2)
    zo = ZerothOrder(net.parameters(), module=net)
    basis, x = zo.basis(0), torch.ones(1, 3)

    def moved_by() -> Tensor:
        before = net(x)
        with zo.perturbed(basis, 0, 0.5):
            return (net(x) - before).detach()

    u = [direction(basis.streams[0], i, 0, p.numel()).view(p.shape) for i, p in enumerate(net.parameters())]
    wanted = 0.5 * (u[0].sum(1) + u[1])[None]
    torch.testing.assert_close(moved_by(), wanted)
    net.weight.data = torch.full((2, 3), 2.0)  # other memory under the same parameter
    torch.testing.assert_close(moved_by(), wanted)
    with torch.no_grad():
        net.bias.add_(1.0)
    torch.testing.assert_close(moved_by(), wanted)
    zo.probed = {1}
    torch.testing.assert_close(moved_by(), 0.5 * u[1][None])
    zo.probed = None
    net.weight = nn.Parameter(torch.zeros(2, 3))
    zo.param_groups[0]["params"][0] = net.weight
    torch.testing.assert_close(moved_by(), wanted)
    net.double().float().bfloat16()
    x = x.bfloat16()
    torch.testing.assert_close(moved_by(), wanted.bfloat16())


@pytest.mark.parametrize(("few", "dtypes"), [(148, {}), (1 << 16, {3: torch.bfloat16})])
def test_many_or_mixed_ones_are_moved_layer_by_layer(
    few: int, dtypes: dict[int, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {i: nn.Parameter(p.to(dtypes.get(i, p.dtype))) for i, p in enumerate(parameters())}
    assert Together.of(dict(list(held.items())[:3])) is not None
    monkeypatch.setattr(together, "FEW", few)
    assert Together.of(held) is None
    assert Together.of({}) is None
