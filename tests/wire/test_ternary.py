from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hosfl_lightning.rng import Domain, Stream
from hosfl_lightning.wire import Codecs, Coded, CodedGradient
from tests.wire.samples import BASIS, STREAM, same


def _rows(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _coded(x: Tensor) -> Coded:
    return Coded.of(x, "ternary", STREAM, 0)


def _digits(coded: Coded) -> list[list[int]]:
    """(n, h) values q, unpacked one by one."""
    rows = [[byte // 3**i % 3 - 1 for byte in row for i in range(5)] for row in coded.values.tolist()]
    return [row[: coded.width] for row in rows]


@pytest.mark.parametrize("width", [1, 4, 5, 33, 128, 20000])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_it_is_the_sign_above_three_quarters_of_the_mean_and_the_mean_of_those(width: int, scale: float) -> None:
    x = _rows(0, 7, width, scale=scale)
    coded = _coded(x)
    assert coded.scale is not None
    for row, digits, s in zip(x.double().tolist(), _digits(coded), coded.scale.tolist()):
        threshold = 0.75 * sum(map(abs, row)) / width
        kept = [abs(value) for value in row if abs(value) > threshold]
        step = max(map(abs, row)) / 65536
        for value, digit in zip(row, digits):
            if abs(abs(value) - threshold) > 2 * step:
                assert digit == (math.copysign(1, value) if abs(value) > threshold else 0)
        assert s == pytest.approx(sum(kept) / len(kept), rel=2**-8)
    assert torch.equal(coded.restore(), torch.tensor(_digits(coded)) * coded.scale.float()[:, None])


def test_it_is_near_and_near_in_direction_for_normal_rows() -> None:
    x = _rows(1, 4000, 128)
    back = _coded(x).restore()
    assert ((back - x).square().mean() / x.square().mean()).item() == pytest.approx(0.19, abs=0.005)
    assert ((back * x).sum() / x.square().sum()).item() == pytest.approx(0.81, abs=0.005)
    size, largest = x.abs(), x.abs().amax(1, keepdim=True)
    unbiased = size * (largest - size)  # variance of rounding to 0 or the largest
    assert (unbiased.sum() / x.square().sum()).item() == pytest.approx(1.26, abs=0.01)


def test_the_order_of_adding_does_not_show() -> None:
    row = _rows(2, 100000, 128)[22746:22747]  # whose scale in bf16 another order of adding its floats changes
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    coded, other = _coded(row), _coded(row[:, order].contiguous())
    assert coded.scale is not None
    assert other.scale is not None
    assert same(coded.scale, other.scale)
    assert same(coded.restore()[:, order].contiguous(), other.restore())


def test_rows_alone_are_as_together() -> None:
    x = _rows(2, 300, 128)
    assert same(torch.cat([_coded(row).restore() for row in x.split(1)]), _coded(x).restore())


def test_what_is_zero_stays_so_and_the_only_value_of_a_row_comes_back() -> None:
    x = torch.zeros(3, 128)
    x[1, 77], x[2, :64] = -0.375, _rows(3, 64)
    back = _coded(x).restore()
    assert same(back[:2], x[:2])
    assert not back[2, 64:].any()
    assert back[2, :64].any()


@pytest.mark.parametrize("count", [1, 8, 100])
def test_what_fills_up_the_last_row_of_a_gradient_counts_for_nothing(count: int) -> None:
    g = torch.cat([_rows(4, 128), _rows(5, count)])
    message = CodedGradient.pack(0, 0, BASIS, g, 1, "ternary", 0)
    assert same(message.unpack()[128:], _coded(g[None, 128:]).restore()[0])


def test_nothing_is_drawn() -> None:
    x = _rows(5, 6, 40)
    other = Coded.of(x, "ternary", Stream(9, Domain.ROUNDING, 4, client=2), 65535)
    assert same(other, _coded(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(bad: float) -> None:
    x = _rows(6, 3, 128)
    x[1, 5] = bad
    scale = _coded(x).scale
    assert scale is not None
    assert scale.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["smashed_data", "multiplier"])
def test_a_biased_codec_is_for_gradients_only(name: str) -> None:
    assert Codecs(gradient="ternary").gradient == "ternary"
    with pytest.raises(ValueError, match=rf"trainer\.codec\.{name} must be one of fp32, bf16, fp16, int8, int4, got"):
        Codecs(**{name: "ternary"})
