"""The weights of a round, and the weighted mean over clients with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weights(num_terms: Sequence[int]) -> list[float]:
    """w_k = n_k / Σ_j n_j.

    ℓ_k is a mean over n_k loss terms, so with these weights Σ_k w_k ℓ_k is the mean over all terms of the round, as if
    one client held the concatenated batch. The same weights serve the server's loss and the clients' coefficients, and
    enter each of them once. After a client drops out, call this again with those who answered.

    Args:
        num_terms: n_k of every participating client, >= 0, in client order.

    Returns:
        One float64 weight per client.

    Raises:
        ValueError: A negative count, or no loss term at all.
    """
    for client, count in enumerate(num_terms):
        if count < 0:
            raise ValueError(f"num_terms[{client}] is {count}; a client's number of loss terms cannot be negative")
    total = sum(num_terms)
    if total == 0:
        raise ValueError("no client has a loss term: check that the labels of this round are not all ignored (-100)")
    return [count / total for count in num_terms]


def weighted_mean(coefficients: Tensor, weights: Sequence[float]) -> Tensor:
    """v̄_p = Σ_k w_k v_kp.

    Summed in float64, row after row from k = 0, with a rounding after each product and each sum. Sums are not
    associative, and a matrix product would choose its own order; this one is the same on every device and thread count.
    K copies of one float32 client give that client's coefficients exactly.

    Args:
        coefficients: v_kp, (K, P) float32 or float64, one row per client in client order.
        weights: w_k, K of them, as :func:`weights` returns.

    Returns:
        v̄_p, (P,) float32 on the device of ``coefficients``.

    Raises:
        ValueError: Shapes that do not fit, or a client whose coefficients are not finite in float32.
        TypeError: Coefficients of another dtype.
    """
    check_coefficients(coefficients, weights)
    mean = torch.zeros_like(coefficients[0], dtype=torch.float64)
    for weight, row in zip(weights, coefficients, strict=True):
        mean += row.double() * weight
    return mean.float()


def check_coefficients(coefficients: Tensor, weights: Sequence[float]) -> None:
    """Refuse what no rule can aggregate.

    Raises:
        ValueError: Shapes that do not fit, or a client whose coefficients are not finite in float32.
        TypeError: Coefficients of another dtype.
    """
    if coefficients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"coefficients must be float32 or float64, got {coefficients.dtype}")
    if coefficients.dim() != 2 or not len(coefficients) or len(coefficients) != len(weights):
        raise ValueError(
            f"coefficients must be (K, P), one row for each of {len(weights)} weights, got {tuple(coefficients.shape)}"
        )
    bad = torch.nonzero(~torch.isfinite(coefficients.float()))
    if len(bad):
        row, probe = bad[0].tolist()
        raise ValueError(
            f"client row {row} has a coefficient that is not finite: probe {probe} is {coefficients[row, probe].item()}"
        )
