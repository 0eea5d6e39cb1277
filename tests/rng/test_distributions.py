from __future__ import annotations

import importlib.util
import math
import random
from fractions import Fraction
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

import pytest
import torch

from hosfl_lightning.rng import Domain, Stream, add_direction_, round_coefficient
from hosfl_lightning.rng.distributions import gauss16_table

CPU = torch.device("cpu")
STREAM = Stream(11, Domain.GAUSS16, round=3)


@pytest.fixture
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_gauss16_table.py"
    spec = importlib.util.spec_from_file_location("make_gauss16_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_rebuilds_the_table(tool: ModuleType) -> None:
    assert torch.equal(tool.make_table().float(), gauss16_table(CPU))


def test_table_entries_are_the_nearest_bfloat16() -> None:
    table = gauss16_table(CPU).tolist()
    assert len(table) == 65536
    for h, entry in enumerate(table):
        exact = NormalDist().inv_cdf((h + 0.5) / 65536)
        ulp = 2.0 ** (math.frexp(exact)[1] - 8)
        assert abs(entry - exact) <= ulp / 2
        assert entry / ulp == round(entry / ulp)


def test_table_moments_are_those_of_a_normal() -> None:
    table = gauss16_table(CPU).double()
    assert torch.equal(table, -table.flip(0))
    assert table.mean() == 0
    assert abs(table.square().mean() - 1) < 1e-4
    assert abs(table.pow(4).mean() - 3) < 5e-3
    assert table.diff().min() >= 0


def coefficients() -> list[float]:
    draw = random.Random(1)
    return [draw.choice([-1, 1]) * math.ldexp(draw.uniform(0.5, 1), draw.randint(-60, 60)) for _ in range(300)]


def test_rounding_is_to_the_nearest_and_ties_go_to_even() -> None:
    for alpha in coefficients():
        ulp = Fraction(2) ** (math.frexp(alpha)[1] - 16)
        assert Fraction(round_coefficient(alpha, Domain.GAUSS16)) == round(Fraction(alpha) / ulp) * ulp
    tie = 2.0**15 + 0.5
    assert round_coefficient(tie, Domain.GAUSS16) == 2.0**15
    assert round_coefficient(tie + 1, Domain.GAUSS16) == 2.0**15 + 2
    # Rounded to fp32 first, this would be a tie and go down.
    assert round_coefficient(tie + 2**-20, Domain.GAUSS16) == 2.0**15 + 1
    assert round_coefficient(0.0, Domain.GAUSS16) == 0.0


def test_rademacher_coefficients_are_rounded_to_fp32() -> None:
    for alpha in coefficients():
        assert round_coefficient(alpha, Domain.RADEMACHER) == torch.tensor(alpha, dtype=torch.float32).item()
    alphas = torch.tensor(coefficients())
    assert torch.equal(round_coefficient(alphas, Domain.RADEMACHER), alphas)


def test_tensors_are_rounded_like_floats() -> None:
    ties = torch.arange(2**15, 2**15 + 64) + 0.5
    alphas = torch.cat([torch.tensor(coefficients()), ties, -ties, torch.tensor([0.0])])
    expected = [round_coefficient(alpha, Domain.GAUSS16) for alpha in alphas.tolist()]
    assert round_coefficient(alphas, Domain.GAUSS16).tolist() == expected
    assert round_coefficient(alphas[0], Domain.GAUSS16).shape == ()


def test_infinities_and_every_nan_stay_what_they_are() -> None:
    all_bits_set = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_coefficient(all_bits_set, Domain.GAUSS16).isnan().all()
    infinities = torch.tensor([math.inf, -math.inf])
    assert torch.equal(round_coefficient(infinities, Domain.GAUSS16), infinities)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 1e39])
def test_a_float_that_is_not_finite_is_refused(alpha: float) -> None:
    for domain in (Domain.RADEMACHER, Domain.GAUSS16):
        with pytest.raises(ValueError, match="alpha"):
            round_coefficient(alpha, domain)


def test_a_tensor_of_another_type_or_a_domain_without_directions_is_refused() -> None:
    with pytest.raises(TypeError, match="fp32"):
        round_coefficient(torch.tensor(1.0, dtype=torch.float64), Domain.GAUSS16)
    with pytest.raises(ValueError, match="domain"):
        round_coefficient(1.0, Domain.DATA_ORDER)


def test_products_with_a_rounded_coefficient_are_exact() -> None:
    table = gauss16_table(CPU)
    for alpha in coefficients():
        rounded = torch.tensor(round_coefficient(alpha, Domain.GAUSS16), dtype=torch.float32)
        assert torch.equal((rounded * table).double(), rounded.double() * table.double())


def test_fused_and_separate_multiply_add_agree() -> None:
    # Of two fp32 numbers float64 holds the product exactly and the sum well enough to round it only once.
    parameters = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    u = torch.zeros(4096)
    add_direction_(u, 1.0, STREAM, 0)
    for alpha in coefficients():
        rounded = torch.tensor(round_coefficient(alpha, Domain.GAUSS16), dtype=torch.float32)
        fused = (parameters.double() + rounded.double() * u.double()).float()
        separate = parameters + rounded * u
        written = parameters.clone()
        add_direction_(written, alpha, STREAM, 0)
        assert torch.equal(fused, separate)
        assert torch.equal(written, separate)
