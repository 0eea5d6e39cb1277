from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from hosfl_lightning.rng import Domain, permutation


def test_golden_permutation() -> None:
    assert permutation(10, 0, Domain.DATA_ORDER).tolist() == [8, 5, 1, 9, 4, 0, 3, 2, 7, 6]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 500])
def test_it_sorts_the_64_bit_keys(n: int, block_bits: Callable[..., int]) -> None:
    seed, domain, client = 2**63 + 5, Domain.CLIENT_SAMPLING, 4

    def key(i: int) -> int:
        bits = block_bits(seed, domain, 0, i // 2, round=6, field=client + 1)
        return bits >> 64 * (i % 2) & 2**64 - 1

    result = permutation(n, seed, domain, round=6, client=client)
    assert result.dtype == torch.int64
    assert result.tolist() == sorted(range(n), key=key)


def test_every_argument_changes_it() -> None:
    base = permutation(50, 1, Domain.DATA_ORDER)
    others = [
        permutation(50, 2, Domain.DATA_ORDER),
        permutation(50, 1, Domain.COORDINATES),
        permutation(50, 1, Domain.DATA_ORDER, round=1),
        permutation(50, 1, Domain.DATA_ORDER, client=0),
        permutation(50, 1, Domain.DATA_ORDER, client=1),
    ]
    assert len({tuple(p.tolist()) for p in [base, *others]}) == 6
    assert torch.equal(base, permutation(50, 1, Domain.DATA_ORDER))


def test_the_first_entry_is_uniform() -> None:
    rounds = 2000
    counts = Counter(int(permutation(8, 0, Domain.CLIENT_SAMPLING, round=r)[0]) for r in range(rounds))
    chi_square = sum((counts[i] - rounds / 8) ** 2 / (rounds / 8) for i in range(8))
    assert chi_square < 24.3  # 99.9 % of a chi-square with 7 degrees of freedom


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be"):
        permutation(-1, 0, Domain.DATA_ORDER)
