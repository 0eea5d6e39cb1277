from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import Dense, SharedDirections, basis_of
from hosfl_lightning.optim.basis import CHUNK, SMALL, Basis, buckets
from hosfl_lightning.rng import DISTRIBUTIONS, Stream, direction, round_coefficient

SIZES = [5, 0, SMALL, 130, SMALL + 1, 7, CHUNK + 3, 1]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random_tensors(sizes: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def reconstruct(basis: Basis, coefficients: Tensor, sizes: list[int]) -> list[Tensor]:
    tensors = [torch.zeros(size) for size in sizes]
    basis.apply(tensors, coefficients, 1.0)
    return tensors


@pytest.mark.parametrize("sizes", [SIZES, [SMALL] * 9, [3 * CHUNK], [1], [SMALL + 1, 2, SMALL + 1, 2]])
def test_buckets_hold_every_element_once(sizes: list[int]) -> None:
    cut = buckets(sizes)
    seen: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for bucket in cut:
        assert 0 < sum(stop - start for _, start, stop in bucket) <= CHUNK
        for tensor, start, stop in bucket:
            seen[tensor].append((start, stop))
            if len(bucket) > 1:
                assert (start, stop) == (0, sizes[tensor])
    for size, runs in zip(sizes, seen):
        starts, stops = zip(*runs)
        assert (*stops[:-1], size) == (*starts[1:], stops[-1])
        assert starts[0] == 0


def test_no_tensor_makes_no_bucket() -> None:
    assert buckets([]) == []


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_expansion_is_the_sum_of_directions(distribution: str) -> None:
    basis = SharedDirections(2**63 + 5, 9, 3, distribution)
    coefficients = torch.tensor([0.3, -1.7, 2.1])
    actual = reconstruct(basis, coefficients, SIZES)
    alphas = round_coefficient(coefficients / 3, basis.domain)
    for tensor, size in enumerate(SIZES):
        expected = torch.zeros(size)
        for probe, alpha in enumerate(alphas):
            stream = Stream(2**63 + 5, DISTRIBUTIONS[distribution], round=9, probe=probe)
            expected += alpha * direction(stream, tensor, 0, size)
        assert torch.equal(actual[tensor], expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_projecting_is_the_inner_product_with_each_direction(distribution: str) -> None:
    basis = SharedDirections(1, 2, 2, distribution)
    gradient = random_tensors(SIZES)
    expected = [
        torch.stack([(g.double() * direction(stream, t, 0, len(g))).sum() for t, g in enumerate(gradient)]).sum()
        for stream in basis.streams
    ]
    torch.testing.assert_close(basis.project(gradient), torch.stack(expected).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_reconstructing_a_projection_is_unbiased(distribution: str) -> None:
    sizes, rounds, probes = [30, 12, 1], 8, 128
    gradient = random_tensors(sizes)
    total = torch.zeros(sum(sizes))
    for round in range(rounds):
        basis = SharedDirections(7, round, probes, distribution)
        total += torch.cat(reconstruct(basis, basis.project(gradient), sizes)) / rounds
    g = torch.cat(gradient)
    # Var(⟨g, u⟩ u_i) = ‖g‖² + (E u⁴ − 2) g_i², with E u⁴ = 1 for signs and 3 for normals.
    fourth = {"rademacher": 1, "gauss16": 3}[distribution]
    deviation = ((g.square().sum() + (fourth - 2) * g.square()) / (rounds * probes)).sqrt()
    z = (total - g) / deviation
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean() < 1.6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_cosine_grows_like_the_root_of_the_number_of_probes(distribution: str) -> None:
    sizes, rounds = [200, 56], 16
    gradient = random_tensors(sizes)
    # E⟨ĝ, g⟩ = ‖g‖² and E‖ĝ‖² = ‖g‖² (P + d) / P nearly; for one probe ⟨ĝ, g⟩ = ⟨g, u⟩², whose root has mean √(2/π).
    expected = {1: (2 / torch.pi / 256) ** 0.5, 8: (8 / 264) ** 0.5, 64: (64 / 320) ** 0.5}
    for probes, cosine in expected.items():
        cosines = []
        for round in range(rounds):
            basis = SharedDirections(3, round, probes, distribution)
            estimate = torch.cat(reconstruct(basis, basis.project(gradient), sizes))
            cosines.append(torch.cosine_similarity(estimate, torch.cat(gradient), dim=0))
        assert abs(torch.stack(cosines).mean() - cosine) < 4 * (256 * rounds) ** -0.5 + 0.03 * cosine


def test_rounds_probes_seeds_and_tensors_have_directions_of_their_own() -> None:
    def direction_of(seed: int, round: int, probe: int) -> list[Tensor]:
        coefficients = torch.zeros(2)
        coefficients[probe] = 2.0
        return reconstruct(SharedDirections(seed, round, 2), coefficients, [400, 400])

    directions = torch.stack([u for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)] for u in direction_of(*key)])
    correlation = directions @ directions.T / 400
    assert (correlation - torch.eye(8)).abs().max() < 0.2


def test_dense_gives_the_gradient_back() -> None:
    shapes = [(3, 5), (), (CHUNK + 3,), (2, 2)]
    gradient = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    sizes = [g.numel() for g in gradient]
    basis = Dense(sizes)
    coefficients = basis.project([g.bfloat16() for g in gradient])
    assert coefficients.dtype == torch.float32
    assert coefficients.shape == (basis.size,) == (sum(sizes),)
    for actual, expected in zip(reconstruct(basis, coefficients, sizes), gradient):
        assert torch.equal(actual, expected.bfloat16().float().view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_is_the_sum_in_fp32_cast_once(dtype: torch.dtype) -> None:
    sizes = [SMALL + 1, 6, 4]
    parameters = [nn.Parameter(t.to(dtype)) for t in random_tensors(sizes)]
    before = [p.detach().clone() for p in parameters]
    basis, coefficients = SharedDirections(0, 0, 2), torch.tensor([0.5, 1.0])
    basis.apply([p.view(2, -1) if p.numel() == 6 else p for p in parameters], coefficients, -0.1)
    for parameter, old, update in zip(parameters, before, reconstruct(basis, coefficients, sizes)):
        assert torch.equal(parameter, (old.float() + update * -0.1).to(dtype))
        assert not torch.equal(parameter, old)


def test_the_number_of_threads_does_not_matter(restored_threads: None) -> None:
    # Products of all magnitudes that cancel: what remains is the rounding of each partial sum.
    basis, half = SharedDirections(0, 0, 1), CHUNK // 2
    magnitudes = torch.randn(half, generator=torch.Generator().manual_seed(0)) * torch.linspace(-60, 60, half).exp2()
    gradient = direction(basis.streams[0], 0, 0, CHUNK) * torch.cat([magnitudes, -magnitudes.flip(0)])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(basis.project([gradient]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_default_dtype_does_not_matter() -> None:
    basis, gradient = SharedDirections(0, 0, 2), random_tensors([4, 9])
    expected = reconstruct(basis, basis.project(gradient), [4, 9])
    torch.set_default_dtype(torch.float64)
    try:
        tensors = [torch.zeros(4, dtype=torch.float32), torch.zeros(9, dtype=torch.float32)]
        basis.apply(tensors, basis.project(gradient), 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, e) for a, e in zip(tensors, expected))


def test_what_a_receiver_needs_is_described() -> None:
    assert SharedDirections(0, 0, 3, "gauss16").describe() == {
        "kind": "shared_directions", "probes": 3, "distribution": "gauss16",
    }  # fmt: skip
    assert Dense([2, 3]).describe() == {"kind": "dense"}


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"distribution must be one of rademacher, gauss16, got 'cauchy'"):
        SharedDirections(0, 0, 2, "cauchy")
    for probes in (0, 4097):
        with pytest.raises(ValueError, match=f"probes must be between 1 and 4096, got {probes}"):
            SharedDirections(0, 0, probes)
    with pytest.raises(ValueError, match="seed"):
        SharedDirections(-1, 0, 2)
    with pytest.raises(ValueError, match="round"):
        SharedDirections(0, 2**32, 2)


@pytest.mark.parametrize("basis", [SharedDirections(5, 3, 2, "gauss16"), SharedDirections(5, 3, 4), Dense([4, 9])])
def test_a_basis_is_rebuilt_from_its_description(basis: Basis) -> None:
    description = json.loads(json.dumps(basis.describe()))
    rebuilt = basis_of(description, 5, 3, [4, 9])
    assert type(rebuilt) is type(basis)
    coefficients = torch.randn(basis.size, generator=torch.Generator().manual_seed(0))
    expected = reconstruct(basis, coefficients, [4, 9])
    assert all(torch.equal(a, e) for a, e in zip(reconstruct(rebuilt, coefficients, [4, 9]), expected))


@pytest.mark.parametrize(
    "description",
    [{}, {"kind": "moons"}, {"kind": "dense", "probes": 2}, {"kind": "shared_directions", "probes": 2}],
)
def test_a_description_of_no_basis_is_shown(description: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no basis is described by") as error:
        basis_of(description, 0, 0, [1])
    assert str(description) in str(error.value)
