"""How z, λ and a client's gradient travel: as they are, or rounded to fewer bits.

    codec   an (n, h) tensor x travels as                      what comes back
    fp32    x, bit for bit in the dtype it has                 x
    bf16    x to nearest                                       within 2^-8 |x|
    fp16    x/s to nearest, one s for the tensor               within 2^-11 |x|, or s 2^-25 where that is more
    int8    q = floor(x/s + r), a scale s per row              q·s, |q·s - x| < s, E q·s = x
    int4    the same in four bits, two columns a byte          the same
    ternary q = sgn(x) where |x| > t, else 0; five columns     q·s, near the best of this form for Gaussian values
            a byte

fp16: s is the power of two that puts max|x| into [2^14, 2^15), so that scaling is exact and a small λ does not
underflow. int8 and int4: s = max_j |x_j| / 127 (or 7) rounded *up* to bf16. Up, so that the largest entry does not
clip; bf16, since it has fp32's range in two bytes and costs at most 2^-7 of s, and since q·s then has at most 15
significant bits: the product is exact in fp32 and the same on every device. r is :func:`uniform16` of the stream
(seed, ROUNDING, round, client, local step), so that the rounding is unbiased and can be done again; element e of x is
row-major. float64 goes through fp32.

ternary: t = 3/4 of the mean of the row's |x_j| that are not zero, s = the mean of the |x_j| above t, in bf16. It is
biased, so `Codecs` does not offer it for z and λ: for Gaussian rows of 128, ⟨q·s, x⟩ = 0.81 ‖x‖² and ‖q·s - x‖² =
0.19 ‖x‖² (1.26 ‖x‖² if three values were rounded to without bias, with s = max|x_j|). The sums are of integers, |x_j|
over the row's largest in 2^-16, so that no device's order of adding shows.

A row is a token's z or λ, or 128 coefficients of a gradient.

References: D. Alistarh et al., "QSGD" (NeurIPS 2017), for stochastic rounding with a scale per bucket; F. Li et al.,
"Ternary Weight Networks" (arXiv 1605.04711), equations 5 and 6, for t and s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_client.wire.arrays import FLOATS, WORDS
from hosfl_client.wire.checks import check_tensor
from hosfl_client.wire.coded import check_coded
from hosfl_client.wire.errors import FieldError
from hosfl_lightning.rng import Stream, uniform16
from hosfl_lightning.wire.arrays import TENSORS
from hosfl_lightning.wire.codec import Codec, codec_of

_DTYPES = {WORDS[code]: TENSORS.dtypes[code] for code in FLOATS}


class FP32(Codec):
    """x in the dtype that it has."""

    name = "fp32"
    form = torch.float32

    @override
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        return x, None

    @override
    def decode(self, values: Tensor, scale: Tensor | None, width: int) -> Tensor:
        return values


class BF16(Codec):
    """x to nearest."""

    name = "bf16"
    form = torch.bfloat16

    @override
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        return x.to(torch.bfloat16), None

    @override
    def decode(self, values: Tensor, scale: Tensor | None, width: int) -> Tensor:
        return values.float()


class Scaled(Codec):
    """A scale a row."""

    @override
    def scales(self, rows: int) -> int | None:
        return rows

    @override
    def decode(self, values: Tensor, scale: Tensor | None, width: int) -> Tensor:
        assert scale is not None
        return self.unpack(values, width).float().mul_(scale.float()[:, None])

    def unpack(self, values: Tensor, width: int) -> Tensor:
        """(n, width), of one number each."""
        return values


class FP16(Scaled):
    """x/s to nearest, one s."""

    name = "fp16"
    form = torch.float16

    @override
    def scales(self, rows: int) -> int | None:
        return 1

    @override
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        scale = _power_of_two(x)
        return (x / scale.float()).half(), scale


class Int8(Scaled):
    """Stochastic rounding to -127..127."""

    name = "int8"
    form = torch.int8

    @override
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        return _round(x, uniform(), 127)


class Int4(Scaled):
    """Stochastic rounding to -7..7, two a byte."""

    name = "int4"

    @override
    def columns(self, width: int) -> int:
        return -(-width // 2)

    @override
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        values, scale = _round(x, uniform(), 7)
        return _pack_nibbles(values), scale

    @override
    def unpack(self, values: Tensor, width: int) -> Tensor:
        return _unpack_nibbles(values, width)


class Ternary(Scaled):
    """-1, 0 or 1, five a byte."""

    name = "ternary"
    biased = True

    @override
    def columns(self, width: int) -> int:
        return -(-width // 5)

    @override
    def encode(self, x: Tensor, uniform: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        values, scale = _signs(x)
        return _pack_trits(values), scale

    @override
    def unpack(self, values: Tensor, width: int) -> Tensor:
        return _unpack_trits(values, width)


CODECS = tuple(Codec.known)
TOKEN_CODECS = tuple(name for name, codec in Codec.known.items() if not codec.biased)
"""Those that z and λ may travel in."""


@dataclass(frozen=True)
class Codecs:
    """In what z, λ and the coefficients of a client's gradient travel: each a name, or the class path of a `Codec`.

    Attributes:
        smashed_data: Of z, one of `TOKEN_CODECS`.
        multiplier: Of λ, one of `TOKEN_CODECS`.
        gradient: Of what a client answers to λ, one of `CODECS`. For one that sends many coefficients (HOSFL with
            ``estimator: local``, SplitFedSGD): int4 is an eighth of fp32; ternary, an eighteenth, is biased, and was
            tried with AdamW. The few scalars of a probing client are smaller as they are.

    Raises:
        ValueError: An unknown codec.
    """

    smashed_data: str = "fp32"
    multiplier: str = "fp32"
    gradient: str = "fp32"

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            codec = codec_of(given, f"trainer.codec.{name}")
            if codec.biased and name != "gradient":
                raise ValueError(
                    f"trainer.codec.{name} must be one of {', '.join(TOKEN_CODECS)}, got {given!r}: that is off in the "
                    "mean, and for a gradient alone"
                )
            object.__setattr__(self, name, codec.name)


@dataclass(frozen=True, eq=False)
class Coded:
    """An (n, h) tensor as it travels.

    Attributes:
        codec: One of `CODECS`.
        dtype: Of what was coded and of what comes back, e.g. ``float32``.
        width: h.
        values: (n, h) in the codec's dtype; int4: (n, ⌈h/2⌉) uint8, the even column in the lower four bits;
            ternary: (n, ⌈h/5⌉) uint8, Σ_i (q_i + 1) 3^i.
        scale: bf16; (1,) for fp16, (n,) for int8, int4 and ternary, else None.
    """

    codec: str
    dtype: str
    width: int
    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, codec: str, stream: Stream, tensor: int) -> Coded:
        """Codes ``x`` where it is; the host does not wait for its device.

        Args:
            x: (n, h), any floating dtype. What is infinite or NaN stays so, or has a scale that is.
            codec: One of `CODECS`.
            stream: Of the rounding of int8 and int4.
            tensor: Index in that stream: 0 for z, 1 for λ, 2 + 2p and 3 + 2p for the z of probe p, 65,535 for a
                gradient.

        Raises:
            FieldError: An unknown codec, or ``x`` of another shape or dtype.
        """
        if codec not in Codec.known:
            raise FieldError(f"codec must be one of {', '.join(Codec.known)}, got {codec!r}")
        check_tensor(TENSORS, codec, "the tensor to be coded", x, 2, FLOATS)
        x = x.detach()
        if codec == "fp32":
            return cls(codec, str(x.dtype).removeprefix("torch."), x.shape[1], x)
        wide = x if codec == "bf16" else x.float()  # which needs no copy of more bits
        values, scale = Codec.known[codec].encode(
            wide, lambda: uniform16(stream, tensor, x.numel(), x.device).view(x.shape)
        )
        return cls(codec, str(x.dtype).removeprefix("torch."), x.shape[1], values, scale)

    def restore(self) -> Tensor:
        """x as the receiver knows it: (n, h) in ``dtype``, finite where values and scale are."""
        if self.codec == "fp32":
            return self.values
        x = Codec.known[self.codec].decode(self.values, self.scale, self.width)
        dtype = _DTYPES[self.dtype]
        # A scale that was rounded up may lead past the largest number of the dtype.
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return x.clamp_(-largest, largest).to(dtype)

    def row_bytes(self) -> int:
        """Memory of one restored row, at least that of the fp32 row it is made from."""
        return self.width * max(4, _DTYPES[self.dtype].itemsize)

    def restored_bytes(self) -> int:
        """Memory of what `restore` returns, at least that of one row."""
        return max(1, len(self.values)) * self.row_bytes()

    def check(self, kind: str, name: str) -> None:
        """Raises FieldError unless everything is as stated above."""
        check_coded(TENSORS, Codec.known, kind, name, self)


def _power_of_two(x: Tensor) -> Tensor:
    """(1,) bf16: s = 2^(e - 15) with max|x| = m·2^e, 1/2 <= m < 1; built from bits, since pow may err by one."""
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    exponent = (torch.frexp(largest).exponent - 15 + 127).clamp(min=1)
    return (exponent.to(torch.int32) << 23).view(torch.float32).to(torch.bfloat16).reshape(1)


def _round(x: Tensor, r: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Int8 (n, h) and bf16 (n,); a row that is zero, or too small for its scale, has scale 0 and comes back zero."""
    # Tensor by tensor: CUDA divides by a Python number by multiplying with its reciprocal.
    scale = _up_to_bf16(x.abs().amax(1) / x.new_full((), largest))
    divisor = torch.where(scale > 0, scale, 1).float()[:, None]
    # Among subnormal numbers a scale is coarse, and the quotient may exceed `largest` by a thousandth.
    return (x / divisor).add_(r).floor_().clamp_(-largest, largest).to(torch.int8), scale


def _signs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 (n, h) of -1, 0, 1 and bf16 (n,): 0 for a row that is zero, not finite for one that is not."""
    largest = x.abs().amax(1)
    steps = x.abs().div_(torch.where(largest > 0, largest, 1)[:, None]).mul_(65536).to(torch.int32)
    filled = (steps > 0).sum(1, keepdim=True).clamp_(min=1)
    kept = steps > (3 * steps.sum(1, keepdim=True) // (4 * filled)).to(torch.int32)
    mean = steps.mul_(kept).sum(1).float() / kept.sum(1).clamp_(min=1).float() / 65536
    scale = (largest * mean).to(torch.bfloat16)
    top = torch.finfo(torch.bfloat16).max  # to which the nearest may not be rounded up
    scale = torch.where(largest.isfinite(), scale.clamp(max=top), largest.to(torch.bfloat16))
    return (x > 0).to(torch.int8).sub_((x < 0).to(torch.int8)).mul_(kept), scale


def _up_to_bf16(s: Tensor) -> Tensor:
    """The least bf16 number >= s, for fp32 s >= 0; infinite and NaN stay (CUDA's NaN would carry over into -0)."""
    up = (s.view(torch.int32) + 0xFFFF & -0x10000).view(torch.float32)
    return torch.where(s.isfinite(), up, s).to(torch.bfloat16)


def _pack_nibbles(q: Tensor) -> Tensor:
    q = torch.nn.functional.pad(q, (0, q.shape[1] % 2)).view(torch.uint8)
    return q[:, 0::2] & 15 | q[:, 1::2] << 4


def _unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    signed = packed.view(torch.int8)
    return torch.stack([signed << 4 >> 4, signed >> 4], dim=2).flatten(1)[:, :width]


def _pack_trits(q: Tensor) -> Tensor:
    digits = torch.nn.functional.pad(q, (0, -q.shape[1] % 5)).add_(1).to(torch.uint8).unflatten(1, (-1, 5))
    return digits.mul_(_powers_of_three(q)).sum(2, dtype=torch.uint8)


def _unpack_trits(packed: Tensor, width: int) -> Tensor:
    digits = packed[:, :, None] // _powers_of_three(packed) % 3
    return digits.to(torch.int8).sub_(1).flatten(1)[:, :width]


def _powers_of_three(like: Tensor) -> Tensor:
    return like.new_tensor([1, 3, 9, 27, 81], dtype=torch.uint8)
