"""From random words to elements: Rademacher signs and 16-bit Gaussians, and the rounding that keeps α·u exact.

Element e of a direction, counted row-major in the full logical tensor:

    Rademacher   block e >> 7, word (e >> 5) & 3, bit = (word >> (e & 31)) & 1,             u_e = 1 - 2·bit
    gauss16      block e >> 3, word (e >> 1) & 3, h = (word >> 16·(e & 1)) & 0xFFFF,        u_e = T[h]

T[h] is the inverse normal CDF at (h + 1/2)/65536 rounded to bfloat16, so that u is exact in every floating-point type.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from hosfl_client.bfloat16 import BFLOAT16, Floats, widen
from hosfl_client.rng.philox import Words
from hosfl_client.rng.streams import Domain

DISTRIBUTIONS = {"rademacher": Domain.RADEMACHER, "gauss16": Domain.GAUSS16}
LOG2_BLOCK = {Domain.RADEMACHER: 7, Domain.GAUSS16: 3}

GAUSS16_SHA256 = "33888ab6f4616c9a0d6bba520458612f7f70d5be5df01e655e1fe972d49d478b"
GAUSS16_SIGNIFICANT_BITS = 16


def check_distribution(domain: Domain) -> None:
    """Raise ``ValueError`` for a domain whose words are not directions."""
    if domain not in LOG2_BLOCK:
        raise ValueError(f"the stream's domain must be one of {[d.name for d in LOG2_BLOCK]}, got {domain!r}")


@lru_cache(maxsize=1)
def gauss16_table() -> Floats:
    """The (65536,) table T.

    Raises:
        RuntimeError: The packaged file is not the table of the standard.
    """
    content = (files("hosfl_client") / "assets" / "gauss16.safetensors").read_bytes()
    bits = content[-(2 << 16) :]  # behind the header stands the one tensor
    if hashlib.sha256(bits).hexdigest() != GAUSS16_SHA256:
        raise RuntimeError("assets/gauss16.safetensors is damaged: install hosfl-client anew")
    return widen(np.frombuffer(bits, BFLOAT16))


@lru_cache(maxsize=1)
def _signs() -> Floats:
    """(256, 8): the signs that a byte's bits stand for, least significant first."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return (1 - 2 * bits).astype(np.float32)


def expand(words: Words, domain: Domain, alpha: float, out: Floats) -> Floats:
    """``out ← α·u``, of all words.

    Args:
        words: Contiguous uint32, little-endian, any shape.
        domain: The distribution.
        alpha: Rounded by :func:`round_coefficient`.
        out: (number of elements,) contiguous.
    """
    if domain == Domain.RADEMACHER:
        # A byte is a row of eight elements. Anything but the mode `raise` writes to `out` directly.
        scaled = _signs() * np.float32(alpha)
        np.take(scaled, words.reshape(-1).view(np.uint8), axis=0, out=out.reshape(-1, 8), mode="wrap")
    else:
        np.take(gauss16_table(), words.reshape(-1).view("<u2"), out=out, mode="wrap")
        if alpha != 1:
            np.multiply(out, np.float32(alpha), out=out)
    return out


def round_coefficient(alpha: float, domain: Domain) -> float:
    """Round α, once and to nearest even, so that α·u is exact in fp32.

    Rademacher: to fp32. gauss16: to 16 significant bits, since u has 8 and fp32 holds 24. Divide by the rounded μ, not
    by the one asked for.

    Args:
        alpha: Any finite number.
        domain: ``Domain.RADEMACHER`` or ``Domain.GAUSS16``.

    Raises:
        ValueError: A number that is not finite in fp32, or a domain without directions.
    """
    check_distribution(domain)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if domain == Domain.GAUSS16:
        mantissa, exponent = math.frexp(alpha)
        shifted = round(math.ldexp(mantissa, GAUSS16_SIGNIFICANT_BITS))
        alpha = math.ldexp(shifted, exponent - GAUSS16_SIGNIFICANT_BITS)
    with np.errstate(over="ignore"):
        rounded = float(np.float32(alpha))
    if not math.isfinite(rounded):
        raise ValueError(f"alpha must be finite in fp32, got {alpha}")
    return rounded


def round_coefficients(alpha: Floats, domain: Domain) -> Floats:
    """The same of each of an array, where what is not finite stays so.

    Subnormal numbers keep 16 bits of those that they have in fp32, as the words stand there.
    """
    check_distribution(domain)
    if domain != Domain.GAUSS16:
        return alpha
    dropped = np.uint32(24 - GAUSS16_SIGNIFICANT_BITS)
    bits: npt.NDArray[np.uint32] = alpha.view(np.uint32)
    half = np.uint32((1 << 7) - 1) + (bits >> dropped & np.uint32(1))
    rounded = (bits + half & np.uint32(0xFFFFFF00)).view(np.float32)
    return np.where(np.isnan(alpha), alpha, rounded)
