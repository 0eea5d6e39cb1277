"""⟨λ, z⟩ in fp64, however many pieces λ comes in, padded or not."""

from __future__ import annotations

import numpy as np
import pytest

from hosfl_client import lagrangian
from hosfl_client.codecs import Coded
from hosfl_client.lagrangian import LagrangianTerm
from hosfl_client.rng import Domain, Stream


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("widened", [16, 1 << 15])
def test_the_sum_is_that_of_the_valid_positions(
    codec: str, padded: bool, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lagrangian, "WIDENED", widened)
    rng = np.random.default_rng(0)
    mask = np.ones((3, 5), bool)
    if padded:
        mask[1, 3:] = mask[2, 0] = False
    coded = Coded.of(rng.standard_normal((int(mask.sum()), 8), np.float32), codec, Stream(1, Domain.ROUNDING), 1)
    term = LagrangianTerm(coded, mask)
    for _ in range(2):  # it is asked again for every probe
        z = rng.standard_normal((3, 5, 8), np.float32)
        expected = (z[mask].astype(np.float64) * coded.restore()).sum()
        assert term(z) == pytest.approx(expected, rel=1e-12)
