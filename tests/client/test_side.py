"""The side adapter in numpy, against sums written out and differences; runs without PyTorch."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from hosfl_client.gelu import erf, gelu
from hosfl_client.side import Bottleneck, normalized


def test_erf_is_that_of_the_library() -> None:
    x = np.concatenate([np.linspace(-7, 7, 20_001), np.geomspace(1e-300, 100, 2000), [0.0]])
    wanted = np.array([math.erf(value) for value in x])
    assert np.abs(erf(x) - wanted).max() < 1e-9
    assert np.isnan(erf(np.nan))


def test_gelu_and_its_derivative() -> None:
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    a, slope = gelu(x)
    wanted = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    assert np.allclose(a, wanted, rtol=2e-7, atol=1e-9)
    step = 1e-4
    sides = [gelu(x.astype(np.float64) + d)[0].astype(np.float64) for d in (-step, step)]
    exact = [0.5 * math.erfc(-v / math.sqrt(2)) + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in x.tolist()]
    assert np.allclose(slope, exact, rtol=2e-7, atol=1e-8)
    assert np.allclose((sides[1] - sides[0]) / (2 * step), slope, atol=5e-3)


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


CASES = {
    "tokens": ((3, 5, 12), (4, 12), None), "vectors": ((6, 12), (4, 12), None), "map": ((2, 12, 5, 7), (4, 12), None),
    "pooled": ((2, 12, 7, 6), (4, 12), (3, 4)), "convolved": ((2, 12, 7, 6), (4, 12, 3, 3), (3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """⟨λ, q⟩ at θ ± δu differs by 2δ⟨g, u⟩."""
    shape, down_shape, pooled = CASES[name]
    h, down, up = 3 * normal(0, *shape), 0.3 * normal(1, *down_shape), normal(2, 9, 4)
    q = Bottleneck(down, up, pooled).forward(h)
    multiplier = normal(3, *q.shape)
    totals = [np.ones_like(down), np.zeros_like(up)]
    Bottleneck(down, up, pooled).add_gradient(totals, h, multiplier)
    totals[0] -= 1  # it adds
    for number, part in enumerate((down, up)):
        u = normal(4 + number, *part.shape)
        sides = []
        for delta in (-0.004, 0.004):
            moved = [part + np.float32(delta) * u if i == number else one for i, one in enumerate((down, up))]
            sides.append(float((Bottleneck(*moved, pooled).forward(h).astype(np.float64) * multiplier).sum()))
        assert (sides[1] - sides[0]) / 0.008 == pytest.approx(float((totals[number] * u).sum()), rel=2e-3, abs=2e-2)
    monkeypatch.setattr("hosfl_client.side.ELEMENTS", 24)  # two positions
    parts = [np.zeros_like(down), np.zeros_like(up)]
    Bottleneck(down, up, pooled).add_gradient(parts, h, multiplier)
    assert all(np.allclose(a, b, atol=2e-4) for a, b in zip(parts, totals))


def test_a_pooled_convolution_written_out() -> None:
    """The kernel sees a pixel's neighbours, zeros around the map, and bins overlap where sizes do not divide."""
    h, down, up = normal(0, 2, 12, 7, 6), normal(1, 4, 12, 3, 3), normal(2, 9, 4)
    x = np.zeros((2, 9, 8, 12), np.float32)
    x[:, 1:-1, 1:-1] = normalized(h.transpose(0, 2, 3, 1).reshape(-1, 12)).reshape(2, 7, 6, 12)
    before = [[np.einsum("bijd,wdij->bw", x[:, r : r + 3, c : c + 3], down) for c in range(6)] for r in range(7)]
    a = gelu(np.array(before))[0]  # (7, 6, 2, 4)
    rows, columns = (slice(0, 3), slice(2, 5), slice(4, 7)), (slice(0, 3), slice(3, 6))
    pooled = [[a[r, c].mean((0, 1)) for c in columns] for r in rows]
    wanted = np.einsum("rcbw,ow->brco", pooled, up).reshape(2, 6, 9)
    assert np.allclose(Bottleneck(down, up, (3, 2)).forward(h), wanted, atol=1e-5)


def test_norm_is_over_channels() -> None:
    x = normalized(5 * normal(0, 30, 64) + 3)
    assert np.allclose(x.mean(1), 0, atol=1e-6) and np.allclose(x.var(1), 1, atol=1e-4)
    assert not normalized(np.full((2, 8), 3, np.float32)).any()


def test_scratch_is_small() -> None:
    h, multiplier = normal(0, 8, 512, 128), normal(1, 8, 512, 128)
    bottleneck = Bottleneck(normal(2, 16, 128), normal(3, 128, 16))
    totals = [np.zeros_like(bottleneck.down), np.zeros_like(bottleneck.up)]
    tracemalloc.start()
    bottleneck.add_gradient(totals, h, multiplier)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < h.nbytes / 2


def test_what_does_not_fit_is_refused() -> None:
    for down, up in [((4, 12), (9, 5)), ((4, 12, 3), (9, 4)), ((4, 12, 2, 2), (9, 4)), ((4, 12), (9, 4, 1))]:
        with pytest.raises(ValueError, match="no bottleneck"):
            Bottleneck(normal(0, *down), normal(0, *up))
    bottleneck = Bottleneck(normal(0, 4, 12), normal(0, 9, 4))
    with pytest.raises(ValueError, match="15 positions of 9"):
        bottleneck.add_gradient([bottleneck.down, bottleneck.up], normal(0, 3, 5, 12), normal(0, 3, 5, 8))
    assert bottleneck.forward(normal(0, 0, 5, 12)).shape[0] == 0
