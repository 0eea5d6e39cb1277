from __future__ import annotations

import random

import pytest
import torch

from hosfl_lightning.data.partition import fixed_subset, partition_by_field, partition_dirichlet, partition_iid


def assert_each_once(parts: list[torch.Tensor], n: int) -> None:
    assert all(part.dtype == torch.int64 and torch.equal(part, part.sort().values) for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(n))


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (10, 3), (101, 8), (1000, 10)])
def test_iid_gives_every_example_to_one_client_in_equal_shares(n: int, k: int, seed: int) -> None:
    parts = partition_iid(n, k, seed)
    assert_each_once(parts, n)
    assert len(parts) == k
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_iid_deals_as_it_always_did() -> None:
    assert [part.tolist() for part in partition_iid(10, 3, 5)] == [[1, 3, 5, 7], [4, 6, 8], [0, 2, 9]]


def test_iid_is_random_and_fixed_by_the_seed() -> None:
    first, again, other = partition_iid(100, 4, 3), partition_iid(100, 4, 3), partition_iid(100, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert not torch.equal(first[0], torch.arange(25))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.3, 1.0, 100.0])
def test_dirichlet_gives_every_example_to_one_client(alpha: float, seed: int) -> None:
    generator = random.Random(seed)
    labels = [generator.choice("abcde") for _ in range(400)]
    parts = partition_dirichlet(labels, 5, alpha, seed)
    assert_each_once(parts, 400)
    assert all(torch.equal(a, b) for a, b in zip(parts, partition_dirichlet(labels, 5, alpha, seed)))
    assert not all(torch.equal(a, b) for a, b in zip(parts, partition_dirichlet(labels, 5, alpha, seed + 10)))


def largest_share(alpha: float) -> float:
    """The share of its class that the client with most of it holds, averaged over ten classes."""
    labels = [index % 10 for index in range(2000)]
    parts = partition_dirichlet(labels, 4, alpha, seed=5, min_examples=0)
    counts = torch.stack([torch.tensor(labels)[part].bincount(minlength=10) for part in parts])
    return float((counts.max(0).values / 200).mean())


def test_dirichlet_alpha_sets_the_skew() -> None:
    assert largest_share(0.01) > 0.9
    assert largest_share(1e6) == pytest.approx(0.25, abs=0.01)
    assert largest_share(0.01) > largest_share(1.0) > largest_share(1e6)


def test_the_seed_draws_the_dirichlet_shares() -> None:
    sizes = {tuple(map(len, partition_dirichlet([0] * 100, 3, 1.0, seed))) for seed in range(5)}
    assert len(sizes) == 5


def test_dirichlet_takes_a_class_in_random_order() -> None:
    part = partition_dirichlet([0] * 1000, 2, 1e6, seed=0)[0]
    assert 400 < int((part < 500).sum()) * 2 < 600


def test_field_makes_a_client_of_each_value() -> None:
    parts = partition_by_field(["b", "a", "b", "c", 7, "7"])
    assert {name: part.tolist() for name, part in parts.items()} == {"7": [4, 5], "a": [1], "b": [0, 2], "c": [3]}
    assert list(parts) == ["7", "a", "b", "c"]


def test_a_subset_is_fixed_distinct_and_spread() -> None:
    chosen = fixed_subset(1000, 100)
    assert chosen == sorted(set(chosen)) == fixed_subset(1000, 100)
    assert 30 < sum(index < 500 for index in chosen) < 70
    assert fixed_subset(5, None) == fixed_subset(5, 9) == [0, 1, 2, 3, 4]


def test_more_clients_than_examples_names_the_setting() -> None:
    with pytest.raises(ValueError, match="num_clients=4 is more than the 3 examples: lower num_clients to 3"):
        partition_iid(3, 4, 0)
    with pytest.raises(ValueError, match="num_clients=4 is more than the 3 examples"):
        partition_dirichlet([0, 1, 2], 4, 1.0, 0)
    with pytest.raises(ValueError, match="num_clients=0"):
        partition_iid(3, 0, 0)


def test_too_few_examples_for_the_least_of_each_client_names_the_settings() -> None:
    with pytest.raises(
        ValueError, match="min_examples_per_client=8: 3 clients need 24 examples, and there are 20; lower it to 6"
    ):
        partition_dirichlet([0, 1] * 10, 3, 1.0, 0, min_examples=8)
    with pytest.raises(ValueError, match="min_examples_per_client=-1: must be at least 0"):
        partition_dirichlet([0, 1] * 10, 3, 1.0, 0, min_examples=-1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e308, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha="):
        partition_dirichlet([0, 1], 2, alpha, 0)


def test_no_values_to_partition_by() -> None:
    with pytest.raises(ValueError, match="no examples"):
        partition_by_field([])
