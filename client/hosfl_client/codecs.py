"""How z, λ and a client's gradient travel: as they are, or rounded to fewer bits.

    codec   an (n, h) array x travels as                       what comes back
    fp32    x, bit for bit in the dtype it has                 x
    bf16    x to nearest                                       within 2^-8 |x|
    fp16    x/s to nearest, one s for the array                within 2^-11 |x|, or s 2^-25 where that is more
    int8    q = floor(x/s + r), a scale s per row              q·s, |q·s - x| < s, E q·s = x
    int4    the same in four bits, two columns a byte          the same
    ternary q = sgn(x) where |x| > t, else 0; five columns     q·s, for a gradient alone: biased
            a byte

The scales s and t, and why they are rounded as they are, are in the standard, ``hosfl_lightning.wire.codecs``; here are
the same bits. r is :class:`Uniform16` of the stream (seed, ROUNDING, round, client, local step), so that the rounding
is unbiased and can be done again; element e of x is row-major. float64 goes through fp32.

Everything is done some rows at a time: beside x and what travels there is at most 1 MiB, or a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from hosfl_client.arrays import ARRAYS
from hosfl_client.bfloat16 import BFLOAT16, DTYPES, LARGEST, Array, Floats, cast, dtype_name, narrow, widen
from hosfl_client.codec import Codec, Uniform
from hosfl_client.rng import Stream, Uniform16
from hosfl_client.wire.arrays import FLOATS
from hosfl_client.wire.checks import check_tensor
from hosfl_client.wire.coded import check_coded
from hosfl_client.wire.errors import FieldError

ELEMENTS = 1 << 15
"""Of the rows that are coded at a time: 128 KiB in fp32."""


class FP32(Codec):
    """x in the dtype that it has: nothing to be done."""

    name = "fp32"
    form = DTYPES["float32"]

    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """As `Codec.encode`."""
        values[:] = x

    def decode(self, values: Array, scale: Array | None, out: Floats) -> None:
        """As `Codec.decode`."""
        widen(values, out)


class BF16(Codec):
    """x to nearest."""

    name = "bf16"
    form = BFLOAT16

    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """As `Codec.encode`."""
        narrow(x, values)

    def decode(self, values: Array, scale: Array | None, out: Floats) -> None:
        """As `Codec.decode`."""
        widen(values, out)


class Scaled(Codec):
    """A scale a row."""

    by_row = True

    def scales(self, rows: int) -> int | None:
        """As `Codec.scales`."""
        return rows

    def decode(self, values: Array, scale: Array | None, out: Floats) -> None:
        """As `Codec.decode`."""
        assert scale is not None
        self.unpack(values, out)
        np.multiply(out, widen(scale)[:, None], out=out)

    def unpack(self, values: Array, out: Floats) -> None:
        """Fill ``out``, (n, width), of one number each."""
        out[:] = values


class FP16(Scaled):
    """x/s to nearest, one s."""

    name = "fp16"
    by_row = False
    form = DTYPES["float16"]

    def scales(self, rows: int) -> int | None:
        """As `Codec.scales`."""
        return 1

    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """As `Codec.encode`."""
        assert scale is not None
        with np.errstate(over="ignore", invalid="ignore"):
            values[:] = x / widen(scale)


class Int8(Scaled):
    """Stochastic rounding to -127..127."""

    name = "int8"
    form = np.dtype(np.int8)

    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """As `Codec.encode`."""
        _round(x, uniform(), 127, values, scale)


class Int4(Scaled):
    """Stochastic rounding to -7..7, two a byte, the even column in the lower four bits."""

    name = "int4"

    def columns(self, width: int) -> int:
        """As `Codec.columns`."""
        return -(-width // 2)

    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """As `Codec.encode`."""
        q = np.zeros((len(x), 2 * values.shape[1]), np.int8)
        _round(x, uniform(), 7, q[:, : x.shape[1]], scale)
        nibbles = q.view(np.uint8)
        np.left_shift(nibbles[:, 1::2], np.uint8(4), out=values)
        values |= nibbles[:, 0::2] & np.uint8(15)

    def unpack(self, values: Array, out: Floats) -> None:
        """As `Scaled.unpack`."""
        signed, four, odd = values.view(np.int8), np.int8(4), out.shape[1] // 2
        out[:, 0::2] = signed << four >> four
        out[:, 1::2] = (signed >> four)[:, :odd]


class Ternary(Scaled):
    """-1, 0 or 1, five a byte: Σ_i (q_i + 1) 3^i."""

    name = "ternary"
    biased = True

    def columns(self, width: int) -> int:
        """As `Codec.columns`."""
        return -(-width // 5)

    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """As `Codec.encode`."""
        digits = np.ones((len(x), values.shape[1], 5), np.uint8)
        flat = digits.reshape(len(x), -1)[:, : x.shape[1]]
        np.add(_signs(x, scale), np.int8(1), out=flat, casting="unsafe")
        digits *= _POWERS
        digits.sum(2, dtype=np.uint8, out=values)

    def unpack(self, values: Array, out: Floats) -> None:
        """As `Scaled.unpack`."""
        out[:] = np.take(_TRITS, values, axis=0).reshape(len(out), -1)[:, : out.shape[1]]


KNOWN: dict[str, Codec] = {codec.name: codec for codec in (FP32(), BF16(), FP16(), Int8(), Int4(), Ternary())}
CODECS = tuple(KNOWN)
TOKEN_CODECS = tuple(name for name, codec in KNOWN.items() if not codec.biased)
"""Those that z and λ may travel in."""

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_TRITS = (np.arange(256, dtype=np.uint8)[:, None] // _POWERS % np.uint8(3)).astype(np.int8) - np.int8(1)


@dataclass(frozen=True, eq=False)
class Coded:
    """An (n, h) array as it travels.

    Attributes:
        codec: One of `CODECS`.
        dtype: Of what was coded and of what comes back, e.g. ``float32``.
        width: h.
        values: (n, h) in the codec's dtype; int4: (n, ⌈h/2⌉) uint8; ternary: (n, ⌈h/5⌉) uint8.
        scale: bfloat16; (1,) for fp16, (n,) for int8, int4 and ternary, else None.
    """

    codec: str
    dtype: str
    width: int
    values: Array
    scale: Array | None = None

    @classmethod
    def of(cls, x: Array, codec: str, stream: Stream, tensor: int) -> Coded:
        """Codes ``x``.

        Args:
            x: (n, h), in one of `DTYPES`. What is infinite or NaN stays so, or has a scale that is.
            codec: One of `CODECS`.
            stream: Of the rounding of int8 and int4.
            tensor: Index in that stream: 0 for z, 1 for λ, 2 + 2p and 3 + 2p for the z of probe p, 65,535 for a
                gradient.

        Raises:
            FieldError: An unknown codec, or ``x`` of another shape or dtype.
        """
        if codec not in KNOWN:
            raise FieldError(f"codec must be one of {', '.join(KNOWN)}, got {codec!r:.80}")
        check_tensor(ARRAYS, codec, "the array to be coded", x, 2, FLOATS)
        (n, width), own = x.shape, KNOWN[codec]
        if codec == "fp32" or x.dtype == own.form == BFLOAT16:
            return cls(codec, dtype_name(x), width, x)
        values, count = np.empty((n, own.columns(width)), own.form), own.scales(n)
        scale: Array | None = None if count is None else np.empty(count, BFLOAT16)
        if codec == "fp16":
            scale = _power_of_two(max((np.abs(part).max() for _, part in _widened(x)), default=np.float32(0)))
        uniform, noise = Uniform16(stream, tensor), np.empty(_rows(width) * width, np.float32)
        for rows, part in _widened(x):
            draw = partial(uniform.fill, noise[: part.size], rows.start * width)
            own.encode(part, draw, values[rows], scale[rows] if scale is not None and own.by_row else scale)
        return cls(codec, dtype_name(x), width, values, scale)

    def restore(self, out: Array | None = None) -> Array:
        """x as the receiver knows it: (n, h) in ``dtype``, finite where values and scale are.

        Args:
            out: (n, h) in ``dtype``, to be filled; a new array if None, of fp32 the message's own.
        """
        return self.values if self.codec == "fp32" and out is None else self.restore_rows(0, len(self.values), out)

    def restore_rows(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows ``start .. stop - 1`` of `restore`: (stop - start, h) in ``dtype``."""
        dtype = DTYPES[self.dtype]
        if out is None:
            out = np.empty((stop - start, self.width), dtype)
        if self.codec == "fp32":
            out[:] = self.values[start:stop]
            return out
        codec, step = KNOWN[self.codec], _rows(self.width)
        buffer = None if out.dtype == np.float32 else np.empty((step, self.width), np.float32)
        # A scale that was rounded up may lead past the largest number of the dtype.
        largest = np.float32({"float16": 65504, "bfloat16": LARGEST}.get(self.dtype, np.finfo(np.float32).max))
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            target = out[first - start : rows.stop - start]
            wide = target if buffer is None else buffer[: len(target)]
            scale = self.scale[rows] if self.scale is not None and codec.by_row else self.scale
            with np.errstate(over="ignore", invalid="ignore"):
                codec.decode(self.values[rows], scale, wide)
            np.clip(wide, -largest, largest, out=wide)
            if wide is not target:
                cast(wide, target)
        return out

    def row_bytes(self) -> int:
        """Memory of one restored row, at least that of the fp32 row it is made from."""
        return self.width * max(4, DTYPES[self.dtype].itemsize)

    def restored_bytes(self) -> int:
        """Memory of what `restore` returns, at least that of one row."""
        return max(1, len(self.values)) * self.row_bytes()

    def check(self, kind: str, name: str) -> None:
        """Raises FieldError unless everything is as stated above."""
        check_coded(ARRAYS, KNOWN, kind, name, self)


def _rows(width: int) -> int:
    return max(1, ELEMENTS // max(width, 1))


def _widened(x: Array) -> Iterator[tuple[slice, Floats]]:
    """Some rows at a time in fp32; they are valid until the next."""
    step = _rows(x.shape[1])
    buffer = None if x.dtype == np.float32 else np.empty((step, x.shape[1]), np.float32)
    for start in range(0, len(x) if x.shape[1] else 0, step):
        part = x[start : start + step]
        yield slice(start, start + len(part)), part if buffer is None else widen(part, buffer[: len(part)])


def _power_of_two(largest: np.float32) -> Array:
    """(1,) bf16: s = 2^(e - 15) with max|x| = m·2^e, 1/2 <= m < 1; built from bits, since pow may err by one."""
    exponent = int(np.frexp(largest)[1]) if np.isfinite(largest) else 0
    return np.array([max(exponent - 15 + 127, 1) << 7], "<u2").view(BFLOAT16)


def _round(x: Floats, r: Floats, largest: int, values: Array, scale: Array | None) -> None:
    """Int8 (n, h) and bf16 (n,); a row that is zero, or too small for its scale, has scale 0 and comes back zero."""
    assert scale is not None
    with np.errstate(invalid="ignore"):
        scale[:] = _up_to_bf16(np.abs(x).max(1) / np.float32(largest))
        s = widen(scale)
        q = x / np.where(s > 0, s, np.float32(1))[:, None]
        q += r.reshape(q.shape)
        np.floor(q, out=q)
        # Among subnormal numbers a scale is coarse, and the quotient may exceed `largest` by a thousandth.
        np.clip(q, np.float32(-largest), np.float32(largest), out=q)
        np.copyto(values, q, casting="unsafe")


def _signs(x: Floats, scale: Array | None) -> Array:
    """Int8 (n, h) of -1, 0, 1; fills bf16 (n,): 0 for a row that is zero, not finite for one that is not."""
    assert scale is not None
    size = np.abs(x)
    largest = size.max(1)
    with np.errstate(invalid="ignore", over="ignore"):
        size /= np.where(largest > 0, largest, np.float32(1))[:, None]
        size *= np.float32(65536)
        steps = size.astype(np.int32)
    filled = np.maximum((steps > 0).sum(1, keepdims=True), 1)
    kept = steps > (3 * steps.sum(1, keepdims=True, dtype=np.int64) // (4 * filled)).astype(np.int32)
    steps *= kept
    with np.errstate(invalid="ignore", over="ignore"):
        mean = steps.sum(1, dtype=np.int64).astype(np.float32) / np.maximum(kept.sum(1), 1).astype(np.float32)
        nearest = largest * (mean / np.float32(65536))
    # To nearest may be to infinity, of the largest number.
    nearest = np.minimum(widen(narrow(nearest)), np.float32(LARGEST))
    narrow(np.where(np.isfinite(largest), nearest, largest), scale)
    return ((x > 0).astype(np.int8) - (x < 0).astype(np.int8)) * kept.astype(np.int8)


def _up_to_bf16(s: Floats) -> Array:
    """The least bf16 number >= s, for fp32 s >= 0; infinite and NaN stay."""
    up = s.view(np.uint32) + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)
    return narrow(np.where(np.isfinite(s), up.view(np.float32), s))
