from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hosfl_lightning.rng import Domain, Stream, rounding, uniform16

STREAM = Stream(2**63 + 5, Domain.ROUNDING, round=6, client=4)


def test_it_is_the_16_bits_of_the_standard(block_bits: Callable[..., int]) -> None:
    for tensor in (0, 1):
        r = uniform16(STREAM, tensor, 100)
        assert r.dtype == torch.float32
        for element, value in enumerate(r.tolist()):
            bits = block_bits(STREAM.seed, 6, tensor, element // 8, round=6, field=5)
            assert value == ((bits >> 16 * (element % 8) & 0xFFFF) + 0.5) / 65536


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 8 * 16 - 1, 8 * 16 + 1, 1000])
def test_neither_the_count_nor_the_chunk_matters(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uniform16(STREAM, 3, 4096)
    for chunk in (1, 16, 1 << 14):
        monkeypatch.setattr(rounding, "CHUNK_BLOCKS", chunk)
        assert torch.equal(uniform16(STREAM, 3, count), whole[:count])


def test_it_is_uniform_and_never_0_or_1() -> None:
    r = uniform16(STREAM, 0, 1 << 18)
    assert r.min() > 0
    assert r.max() < 1
    counts = torch.histc(r, 16, 0, 1)
    expected = len(r) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 99.9 % of a chi-square with 15 degrees of freedom


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="tensor must be"):
        uniform16(STREAM, 1 << 16, 1)
    with pytest.raises(ValueError, match="count must be"):
        uniform16(STREAM, 0, -1)


def test_the_users_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    uniform16(STREAM, 0, 100)
    assert torch.equal(before, torch.get_rng_state())
