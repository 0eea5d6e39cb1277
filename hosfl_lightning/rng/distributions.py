"""From random words to elements: Rademacher signs and 16-bit Gaussians, and the rounding that keeps α·u exact.

Element e of a direction, counted row-major in the full logical tensor:

    Rademacher   block e >> 7, word (e >> 5) & 3, bit = (word >> (e & 31)) & 1,             u_e = 1 - 2·bit
    gauss16      block e >> 3, word (e >> 1) & 3, h = (word >> 16·(e & 1)) & 0xFFFF,        u_e = T[h]

T[h] is the inverse normal CDF at (h + 1/2)/65536 rounded to bfloat16, so that u is exact in every floating-point type.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from hosfl_client.rng.distributions import GAUSS16_SIGNIFICANT_BITS, check_distribution
from hosfl_client.rng.distributions import gauss16_table as packaged_table
from hosfl_client.rng.streams import Domain

LOG2_WORD = {Domain.RADEMACHER: 5, Domain.GAUSS16: 1}

FloatOrTensor = TypeVar("FloatOrTensor", float, Tensor)


@lru_cache(maxsize=8)
def gauss16_table(device: torch.device) -> Tensor:
    """The (65536,) table T in fp32.

    Raises:
        RuntimeError: The packaged file is not the table of the standard.
    """
    return torch.from_numpy(packaged_table()).to(device, copy=True)


@lru_cache(maxsize=8)
def _sign_constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The shifts that bring bits 0..31 to the sign's place, the sign's mask and the bits of 1.0."""
    constants = torch.tensor([*range(31, -1, -1), -(1 << 31), 0x3F800000], dtype=torch.int32, device=device)
    return constants[:32], constants[32], constants[33]


class Expander:
    """Turns packed words into the elements u of a distribution.

    Args:
        domain: The distribution.
        device: Where the words are.
    """

    def __init__(self, domain: Domain, device: torch.device) -> None:
        self.domain = domain
        if domain == Domain.RADEMACHER:
            self.shifts, self.sign, self.one = _sign_constants(device)
        else:
            self.table = gauss16_table(device)

    def __call__(self, packed: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` with the elements of all words.

        Args:
            packed: Contiguous int32 words, any shape.
            out: Contiguous 1-D fp32 that holds all elements of ``packed``.

        Returns:
            ``out``.
        """
        words = packed.view(-1)
        if self.domain == Domain.RADEMACHER:
            bits = out.view(torch.int32)
            torch.bitwise_left_shift(words.unsqueeze(1), self.shifts, out=bits.view(-1, 32))
            bits.bitwise_and_(self.sign).bitwise_or_(self.one)
        else:
            index = torch.empty(len(out), dtype=torch.int32, device=out.device)
            torch.bitwise_and(words, 0xFFFF, out=index[0::2])
            torch.bitwise_right_shift(words, 16, out=index[1::2])
            torch.index_select(self.table, 0, index.bitwise_and_(0xFFFF), out=out)
        return out


def round_coefficient(alpha: FloatOrTensor, domain: Domain) -> FloatOrTensor:
    """Round α, once and to nearest even, so that α·u is exact in fp32.

    Rademacher: to fp32. gauss16: to 16 significant bits, since u has 8 and fp32 holds 24. With an exact product, fused
    and separate multiply-add agree (gauss16: as long as α·u is a normal number). Divide by the rounded μ, not by the
    one asked for.

    Args:
        alpha: A Python float; or an fp32 tensor of any shape, rounded where it is (the host does not wait for it).
        domain: ``Domain.RADEMACHER`` or ``Domain.GAUSS16``.

    Returns:
        The rounded value, a Python float or an fp32 tensor as given.

    Raises:
        ValueError: A Python float that is not finite in fp32, or a domain without directions.
        TypeError: A tensor that is not fp32.
    """
    check_distribution(domain)
    if isinstance(alpha, Tensor):
        if alpha.dtype != torch.float32:
            raise TypeError(f"alpha must be a float or an fp32 tensor, got {alpha.dtype}")
        return _round_tensor(alpha) if domain == Domain.GAUSS16 else alpha
    return _round_float(alpha, GAUSS16_SIGNIFICANT_BITS if domain == Domain.GAUSS16 else 53)


def _round_float(alpha: float, significant_bits: int) -> float:
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    mantissa, exponent = math.frexp(alpha)
    rounded = math.ldexp(round(math.ldexp(mantissa, significant_bits)), exponent - significant_bits)
    try:
        return float(struct.unpack("<f", struct.pack("<f", rounded))[0])
    except OverflowError:
        raise ValueError(f"alpha must be finite in fp32, got {alpha}") from None


def _round_tensor(alpha: Tensor) -> Tensor:
    dropped = 24 - GAUSS16_SIGNIFICANT_BITS
    bits = alpha.view(torch.int32)
    half = (1 << dropped - 1) - 1 + (bits >> dropped & 1)
    rounded = (bits + half & -(1 << dropped)).view(torch.float32)
    # CUDA's NaN has all bits set and would carry over into -0.
    return torch.where(alpha.isnan(), alpha, rounded)
