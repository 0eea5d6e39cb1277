"""Clients of unequal size, alike in all else."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.data.partition.contract import Examples, Partitioner
from hosfl_lightning.data.partition.dirichlet import check_alpha
from hosfl_lightning.data.partition.shares import MOST_REDRAWS, by_shares, check_clients, check_least
from hosfl_lightning.data.partition.shuffles import Use, shuffled


class QuantitySkew(Partitioner):
    """|S_j| ≈ n·q_j of a random permutation, with q ~ Dirichlet(α, ..., α), or q_j ∝ j^(-b) for j = 1..k (power law).

    Every client ends with at least `min_examples_per_client` examples: shares that do not give them are drawn again,
    at most 100 times, and then single examples move from the largest clients; one line says how many. The shares of
    the power law are not random, so there examples only move.

    Args:
        alpha: α > 0; smaller is more unequal. None: 0.5, unless there is a `power`.
        power: b >= 0; larger is more unequal, 0 is equal, and the first client is the largest.
        min_examples_per_client: 0: shares are taken as they come, and a client that they leave empty is never sampled.

    Raises:
        ValueError: If both are given, or one is out of range.

    Reference: Li et al. 2021, arXiv 2102.02079, section 4 ("quantity skew").

    Example::

        data = TextData(files=["a.txt"], num_clients=20, partitioner=QuantitySkew(power=1.5))
    """

    def __init__(
        self, alpha: float | None = None, power: float | None = None, min_examples_per_client: int = 1
    ) -> None:
        if alpha is not None and power is not None:
            raise ValueError(f"alpha={alpha}, power={power}: QuantitySkew has one of them; leave the other out")
        if power is not None and not (power >= 0 and math.isfinite(power)):
            raise ValueError(f"power={power}: the exponent must be at least 0")
        self.alpha = 0.5 if alpha is None else alpha
        self.power, self.min_examples_per_client = power, min_examples_per_client
        check_alpha(self.alpha)
        check_least(min_examples_per_client)

    @override
    def __call__(self, examples: Examples, seed: int) -> list[Tensor]:
        n, k, least = len(examples), examples.num_clients, self.min_examples_per_client
        check_clients(n, k, least)
        order = shuffled(n, seed, Use.QUANTITY_SKEW)
        if self.power is not None:
            weights = np.arange(1, k + 1) ** -float(self.power)
            return by_shares([order], lambda: [weights / weights.sum()], order, least, "QuantitySkew", redraws=0)
        generator = np.random.default_rng(seed)
        shares = lambda: [generator.dirichlet(np.full(k, self.alpha))]  # noqa: E731
        return by_shares([order], shares, order, least, "QuantitySkew", MOST_REDRAWS)
