"""The wire's engine here: numpy, with bfloat16 as `BFLOAT16`."""

from __future__ import annotations

import math

import numpy as np

from hosfl_client.bfloat16 import BFLOAT16, Array
from hosfl_client.wire.arrays import WORDS, Arrays, Form

_CHUNK = 1 << 16
"""Elements that are looked at together."""


class NumpyArrays(Arrays):
    """Arrays of numpy; what is read can be written to."""

    def __init__(self) -> None:
        super().__init__({code: BFLOAT16 if code == "BF16" else np.dtype(word) for code, word in WORDS.items()})

    def are(self, value: object) -> bool:
        """As `Arrays.are`."""
        return isinstance(value, np.ndarray)

    def buffer(self, array: Array) -> memoryview:
        """As `Arrays.buffer`."""
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    def view(self, buffers: bytearray, start: int, form: Form) -> Array:
        """As `Arrays.view`."""
        dtype = self.dtypes[form.code]
        if not form.bytes:
            return np.empty(form.shape, dtype)
        return np.frombuffer(buffers, dtype, math.prod(form.shape), start).reshape(form.shape)

    def pack_bits(self, mask: Array) -> Array:
        """As `Arrays.pack_bits`."""
        return np.packbits(mask.reshape(-1))

    def unpack_bits(self, packed: Array, shape: list[int]) -> Array:
        """As `Arrays.unpack_bits`."""
        return np.unpackbits(packed, count=math.prod(shape)).view(np.bool_).reshape(shape)

    def not_finite(self, array: Array) -> int:
        """As `Arrays.not_finite`."""
        if array.dtype != BFLOAT16 and array.dtype.kind != "f":
            return 0
        flat = array.reshape(-1)
        return sum(_not_finite(flat[start : start + _CHUNK]) for start in range(0, len(flat), _CHUNK))


def _not_finite(x: Array) -> int:
    if x.dtype == BFLOAT16:
        return int(np.count_nonzero(x["bfloat16"] & np.uint16(0x7F80) == 0x7F80))
    return len(x) - int(np.count_nonzero(np.isfinite(x)))


ARRAYS = NumpyArrays()
