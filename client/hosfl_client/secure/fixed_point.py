"""Real numbers as integers modulo 2^64, whose sum does not depend on the order and can be masked perfectly."""

from __future__ import annotations

import numpy as np

from hosfl_client.bfloat16 import Array

#: f: bits behind the point.
FRACTION = 24
#: Clients of a sum at most.
MOST_CLIENTS = 1 << 10
#: |n_k v_kp| is below: so the sum over `MOST_CLIENTS` stays within 63 bits.
LARGEST = float((1 << 63) // MOST_CLIENTS >> FRACTION)


class RangeError(ValueError):
    """A number that fixed point does not hold."""


def encode(values: Array, num_terms: int) -> Array:
    """``round(n_k v_kp 2^f) mod 2^64``.

    Args:
        values: v_kp, (P,) float32.
        num_terms: n_k.

    Returns:
        (P,) uint64.

    Raises:
        RangeError: ``|n_k v_kp|`` is not below 2^29.
    """
    finite = np.isfinite(values)
    scaled = np.where(finite, values, 0).astype(np.float64) * num_terms
    bad = np.flatnonzero(~finite | (np.abs(scaled) >= LARGEST))
    if bad.size:
        raise RangeError(f"coefficient {bad[0]} times its {num_terms} loss terms is no number within ±{LARGEST:g}, "
                         "which is all that fixed point holds")  # fmt: skip
    return np.rint(np.ldexp(scaled, FRACTION)).astype(np.int64).view(np.uint64)


def decode_mean(total: Array, num_terms: int) -> Array:
    """``v̄_p = Σ_k n_k v_kp / Σ_k n_k``, off by at most ``K 2^-(f+1) / Σ_k n_k <= 2^-25``, then rounded to fp32.

    Args:
        total: The sum of what `encode` gave, (P,) uint64.
        num_terms: Σ_k n_k, > 0.

    Returns:
        (P,) float32.
    """
    return (total.view(np.int64) / float(num_terms << FRACTION)).astype(np.float32)
