"""A seeded subset of coordinates, and what a client may be told to send of a gradient it knows."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hosfl_lightning.optim import (
    Compression,
    Coordinates,
    Dense,
    RandomProjections,
    RandomSubset,
    SharedDirections,
    Uncompressed,
    basis_of,
)
from hosfl_lightning.optim.basis import CHUNK, Basis, Piece

SIZES = [30, 0, 7, 163]


def gradient_of(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


def reconstruct(basis: Basis, coefficients: Tensor, sizes: list[int] = SIZES) -> Tensor:
    tensors = [torch.zeros(size) for size in sizes]
    basis.apply(tensors, coefficients, 1.0)
    return torch.cat(tensors)


def chosen(round: int, seed: int = 0, count: int = 50) -> Tensor:
    """Where an expansion is not zero."""
    return reconstruct(Coordinates(seed, round, SIZES, count), torch.ones(count)).nonzero().view(-1)


def test_a_sample_has_no_coordinate_twice_and_every_one_as_often() -> None:
    rounds, d, m = 400, 200, 50
    samples = [chosen(round) for round in range(rounds)]
    assert all(len(sample) == m for sample in samples)
    hits = torch.cat(samples).bincount(minlength=d).double()
    z = (hits - rounds * m / d) / (rounds * m / d * (1 - m / d)) ** 0.5
    assert z.abs().max() < 4
    assert 0.7 < z.square().mean() < 1.3
    # Two rounds share m²/d of their coordinates, as independent samples do.
    shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in pairwise(samples)]
    assert abs(sum(shared) / len(shared) - m**2 / d) < 0.7
    assert not torch.equal(chosen(0), chosen(0, seed=1))
    assert torch.equal(chosen(3), samples[3])


def test_coefficients_are_the_gradients_own_values() -> None:
    g = torch.cat(gradient_of(SIZES))
    basis = Coordinates(0, 5, SIZES, 50)
    coefficients = basis.project([t.bfloat16() for t in gradient_of(SIZES)])
    assert coefficients.dtype == torch.float32
    assert torch.equal(coefficients, g.bfloat16().float()[chosen(5)])
    expected = torch.zeros(200).index_put((chosen(5),), coefficients * 4)
    assert torch.equal(reconstruct(basis, coefficients), expected)


def test_the_mean_over_rounds_is_the_gradient() -> None:
    gradient, rounds, m = gradient_of(SIZES), 400, 50
    g = torch.cat(gradient)
    bases = [Coordinates(1, round, SIZES, m) for round in range(rounds)]
    mean = torch.stack([reconstruct(basis, basis.project(gradient)) for basis in bases]).mean(0)
    z = (mean - g) / (g.square() * (200 / m - 1) / rounds).sqrt()
    assert z.abs().max() < 4
    assert 0.7 < z.square().mean() < 1.3


def test_the_order_of_elements_makes_no_difference_to_what_is_chosen_of_them() -> None:
    """Expanded run by run, in any runs, it is the same."""
    basis = Coordinates(0, 0, SIZES, 90)
    coefficients = torch.linspace(-1, 1, 90)
    whole = reconstruct(basis, coefficients).split(SIZES)
    for width in (1, 13, 200):
        for tensor, size in enumerate(SIZES):
            pieces: list[Piece] = [(tensor, start, min(start + width, size)) for start in range(0, size, width)]
            out = [torch.ones(stop - start) for _, start, stop in pieces]
            basis.expand_(out, coefficients, pieces)
            assert all(
                torch.equal(got, 1 + whole[tensor][start:stop])
                for got, (_, start, stop) in zip(out, pieces, strict=True)
            )


def test_a_tensor_longer_than_a_chunk() -> None:
    sizes = [3, CHUNK + 5, 2]
    basis = Coordinates(0, 0, sizes, sum(sizes) - 1)
    out = reconstruct(basis, torch.ones(basis.size), sizes)
    assert (out != 0).sum() == basis.size
    assert torch.equal(out[out != 0].unique(), torch.tensor([sum(sizes) / (sum(sizes) - 1)]))


def test_all_coordinates_are_the_dense_gradient() -> None:
    gradient = gradient_of(SIZES)
    dense, all_of_it = Dense(SIZES), Coordinates(9, 2, SIZES, 200)
    assert torch.equal(all_of_it.project(gradient), dense.project(gradient))
    coefficients = dense.project(gradient)
    assert torch.equal(reconstruct(all_of_it, coefficients), reconstruct(dense, coefficients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_to_parameters_of_any_dtype(dtype: torch.dtype) -> None:
    parameters = [t.to(dtype) for t in gradient_of(SIZES)]
    before = torch.cat(parameters)
    basis = Coordinates(0, 0, SIZES, 50)
    basis.apply(parameters, torch.ones(50), -0.25)
    expected = before.float().index_add(0, chosen(0), torch.ones(50), alpha=-1.0).to(dtype)
    assert torch.equal(torch.cat(parameters), expected)


@pytest.mark.parametrize("count", [0, -1, 201, 2**70])
def test_a_number_of_coordinates_out_of_range_is_named(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count must be between 1 and the 200 trained values.*, got {count}"):
        Coordinates(0, 0, SIZES, count)


@pytest.mark.parametrize("count", [1, 60, 200])
def test_it_is_rebuilt_from_its_description(count: int) -> None:
    basis = Coordinates(5, 3, SIZES, count)
    assert basis.size == count
    rebuilt = basis_of(json.loads(json.dumps(basis.describe())), 5, 3, SIZES)
    coefficients = torch.arange(1.0, count + 1)
    assert torch.equal(reconstruct(rebuilt, coefficients), reconstruct(basis, coefficients))
    other = basis_of(basis.describe(), 5, 4, SIZES)
    assert count == 200 or not torch.equal(reconstruct(other, coefficients), reconstruct(basis, coefficients))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count must be between 1 and"),
        ({"count": 201}, "count must be between 1 and"),
        ({"count": 2**80}, "count must be between 1 and"),
        ({"count": -(2**80)}, "count must be between 1 and"),
        *(
            ({"count": c}, "basis.count must be of type int")
            for c in (True, 2.0, "2", None, [2], {"a": 1}, "9" * 10**5)
        ),
        ({}, "no basis is described by"),
        ({"count": 2, "indices": [1, 2]}, "no basis is described by"),
        ({"count": 2, "seed": 1}, "no basis is described by"),
    ],
)
def test_a_hostile_description_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        basis_of({"kind": "coordinates", **settings}, 0, 0, SIZES)
    assert len(str(error.value)) < 400


COMPRESSIONS = [
    (Uncompressed(), Dense(SIZES)),
    (RandomProjections(8), SharedDirections(3, 4, 8)),
    (RandomProjections(200, "gauss16"), SharedDirections(3, 4, 200, "gauss16")),
    (RandomSubset(8), Coordinates(3, 4, SIZES, 8)),
    (RandomSubset(200), Coordinates(3, 4, SIZES, 200)),
]


@pytest.mark.parametrize(("compression", "expected"), COMPRESSIONS)
def test_a_compression_gives_the_rounds_basis(compression: Compression, expected: Basis) -> None:
    basis, gradient = compression.basis(3, 4, SIZES), gradient_of(SIZES)
    assert basis.describe() == expected.describe()
    coefficients = basis.project(gradient)
    assert torch.equal(coefficients, expected.project(gradient))
    assert torch.equal(reconstruct(basis, coefficients), reconstruct(expected, coefficients))


@pytest.mark.parametrize("compression", [RandomProjections(201), RandomSubset(201)])
def test_more_numbers_than_the_client_trains_are_refused(compression: Compression) -> None:
    with pytest.raises(ValueError, match=r"compression.count=201: the client trains 200 values.*take Uncompressed"):
        compression.basis(0, 0, SIZES)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RandomProjections, {"count": 0}, "compression.count must be at least 1 and at most 4096, got 0"),
        (RandomProjections, {"count": 4097}, "compression.count must be at least 1 and at most 4096, got 4097"),
        (RandomProjections, {"distribution": "cauchy"}, "distribution must be one of rademacher, gauss16"),
        (RandomSubset, {"count": 0}, "compression.count must be at least 1, got 0"),
        (RandomSubset, {"count": -5}, "compression.count must be at least 1, got -5"),
    ],
)
def test_a_compression_out_of_range_is_named(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
