"""How the clients' coefficients become one vector: the mean, and rules that a few bad clients cannot bend at will."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.aggregation.weights import check_coefficients, weighted_mean
from hosfl_lightning.parts import PartError


@dataclass(frozen=True)
class AggregationRule(ABC):
    """``v̄ = rule(v_1..v_K; w_1..w_K)``; K copies of one client give what it gives alone.

    Every rule sums in float64 in an order of its own, so a result is the same for any number of threads. A client of
    weight 0 does not matter. All clients must answer along the same directions, where a coefficient means the same for
    each of them. A subclass is a dataclass: its fields are its settings. What it returns is checked in every round.
    """

    @abstractmethod
    def __call__(self, coefficients: Tensor, weights: Sequence[float]) -> Tensor:
        """Aggregate one round.

        Args:
            coefficients: v_kp, (K, P) float32 or float64 on the CPU, one row per client in client order.
            weights: w_k >= 0, K of them and not all 0, as :func:`~hosfl_lightning.aggregation.weights` returns.

        Returns:
            v̄_p, (P,) float32.

        Raises:
            ValueError: Shapes that do not fit, or a client whose coefficients are not finite in float32.
            TypeError: Coefficients of another dtype.
        """


def aggregated(rule: AggregationRule, coefficients: Tensor, weights: Sequence[float]) -> Tensor:
    """``rule(coefficients, weights)``, as the contract of a rule says.

    Raises:
        PartError: It returns something else.
    """
    mean = rule(coefficients, weights)
    shape, is_tensor = coefficients.shape[1:], isinstance(mean, Tensor)
    if not is_tensor or mean.shape != shape or mean.dtype != torch.float32:
        given = f"{tuple(mean.shape)} {mean.dtype}" if is_tensor else type(mean).__name__
        raise PartError(
            f"aggregation {type(rule).__name__} returned {given}; of coefficients {tuple(coefficients.shape)}, a row a "
            f"client, an AggregationRule makes one row, {tuple(shape)} torch.float32"
        )
    if not mean.isfinite().all():
        raise PartError(
            f"aggregation {type(rule).__name__} returned what is not finite, of coefficients that are; an "
            "AggregationRule returns finite float32 (divide by no weight or spread that may be 0)"
        )
    return mean


@dataclass(frozen=True)
class WeightedMean(AggregationRule):
    """``v̄_p = Σ_k w_k v_kp``, the gradient of the round's mean loss: what the method itself prescribes.

    Breakdown point 0: one client moves the result as far as it likes.

    Reference: HO-SFL, arXiv 2603.14773; the order of the sum is :func:`~hosfl_lightning.aggregation.weighted_mean`'s.
    """

    @override
    def __call__(self, coefficients: Tensor, weights: Sequence[float]) -> Tensor:
        return weighted_mean(coefficients, weights)


@dataclass(frozen=True)
class Median(AggregationRule):
    """``v̄_p = median_k v_kp``, coordinate by coordinate; the mean of the middle two when K is even.

    One client, one vote: ``w_k`` does not enter. It comes from the client's own count of its loss terms, and a weighted
    median belongs to whoever claims half of them. The price is a bias where clients differ in size or in their data,
    even if all are honest.

    Breakdown point 1/2: with at most ``⌈K/2⌉ − 1`` bad clients every ``v̄_p`` lies between two honest ones.

    Reference: Yin et al., Byzantine-robust distributed learning, arXiv 1803.01498, definition 1.
    """

    @override
    def __call__(self, coefficients: Tensor, weights: Sequence[float]) -> Tensor:
        check_coefficients(coefficients, weights)
        voters = torch.tensor(weights, dtype=torch.float64) > 0
        values = coefficients.double()[voters].sort(dim=0).values
        return ((values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2).float()


@dataclass(frozen=True)
class TrimmedMean(AggregationRule):
    """``v̄_p = Σ_{k∈T_p} w_k v_kp / Σ_{k∈T_p} w_k``; ``T_p`` lacks the ``⌊fK⌋`` smallest and largest of the ``v_kp``.

    Clients are counted, not weighed, when they are dropped; what is kept is weighed. Equal values leave by their
    weight, the lightest as the smallest, so that the order of the clients does not matter, to the last bit.

    Breakdown point f: with at most ``⌊fK⌋`` bad clients every ``v̄_p`` lies between two honest ones.

    Args:
        fraction: ``f``, the share of clients dropped at each end, 0 <= f < 0.5. Of fewer than ``1/f`` clients none is.

    Raises:
        ValueError: A fraction out of range.

    Reference: Yin et al., Byzantine-robust distributed learning, arXiv 1803.01498, definition 2.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 0.5:
            raise ValueError(f"TrimmedMean: fraction must be in [0, 0.5), got {self.fraction}; for more use Median")

    @override
    def __call__(self, coefficients: Tensor, weights: Sequence[float]) -> Tensor:
        check_coefficients(coefficients, weights)
        shares, lightest_first = torch.tensor(weights, dtype=torch.float64).sort(stable=True)
        voters = lightest_first[shares > 0]
        values, order = coefficients.double()[voters].sort(dim=0, stable=True)
        shares = shares[shares > 0][order]
        # The decimal as it was written: 0.29 of 100 clients are 29, but 0.29 * 100 is below 29.
        dropped = int(Fraction(str(self.fraction)) * len(values))
        total, mass = torch.zeros_like(values[0]), torch.zeros_like(values[0])
        for value, share in list(zip(values, shares))[dropped : len(values) - dropped]:
            total += value * share
            mass += share
        return (total / mass).float()


@dataclass(frozen=True)
class NormClippedMean(AggregationRule):
    """``v̄ = Σ_k w_k v_k min(1, c / ‖v_k‖₂)``: no client is longer than ``c``, nor is the result.

    Whatever client k sends moves the result by at most ``2 w_k c``. There is no breakdown point: any number of bad
    clients cannot make the result large, but each bends it by its share.

    Args:
        max_norm: ``c``, > 0. For Rademacher or normal directions ``‖v_k‖₂`` is about ``√P ‖∇ℓ_k‖₂``.

    Raises:
        ValueError: A norm that is not positive and finite.

    Reference: Sun et al., Can you really backdoor federated learning?, arXiv 1911.07963, norm thresholding.
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"NormClippedMean: max_norm must be > 0 and finite, got {self.max_norm}")

    @override
    def __call__(self, coefficients: Tensor, weights: Sequence[float]) -> Tensor:
        check_coefficients(coefficients, weights)
        # fsum rounds once, whatever the order; torch sums long rows by parts, one a thread.
        norms = [math.sqrt(math.fsum(row.square().tolist())) for row in coefficients.double()]
        scales = torch.tensor([self.max_norm / max(norm, self.max_norm) for norm in norms], dtype=torch.float64)
        return weighted_mean(coefficients.double() * scales[:, None], weights)
