"""What the wire asks of tensors; an engine answers, such as PyTorch or numpy."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
"""Bytes of an element, by safetensors' code of its dtype: those dtypes that travel."""
WORDS = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The same dtypes in words, and that of what travels as packed bits."""
FLOATS = ("F32", "BF16", "F16", "F64")


class Form(NamedTuple):
    """Dtype, by its code, and shape of a tensor."""

    code: str
    shape: list[int]

    @property
    def itemsize(self) -> int:
        """Of an element on the wire, in bytes."""
        return ITEMSIZE[self.code]

    @property
    def bytes(self) -> int:
        """Of its buffer."""
        return math.prod(self.shape) * self.itemsize


class Arrays(ABC):
    """The tensors of an engine: each has a ``dtype`` and a ``shape``.

    Args:
        dtypes: The engine's dtypes by their codes, those of `WORDS`.
    """

    def __init__(self, dtypes: Mapping[str, Any]) -> None:
        self.dtypes = dtypes
        self._codes = {dtype: code for code, dtype in dtypes.items()}

    def code(self, dtype: Any) -> str:
        """The code of a dtype; of one that does not travel, its name."""
        return self._codes.get(dtype) or str(dtype)

    def form(self, array: Any) -> Form:
        """Dtype and shape."""
        return Form(self.code(array.dtype), [*array.shape])

    def word(self, code: str) -> str:
        """What people who use the engine call the dtype with this code."""
        return WORDS.get(code, code)

    def manifest(self, parameters: Mapping[str, Any]) -> list[list[Any]]:
        """``[name, shape, dtype]`` of the tensors, in the order that numbers the directions."""
        forms = {name: self.form(array) for name, array in parameters.items()}
        return [[name, form.shape, WORDS.get(form.code, form.code)] for name, form in forms.items()]

    @abstractmethod
    def are(self, value: object) -> bool:
        """Whether it is a tensor of this engine."""

    @abstractmethod
    def buffer(self, array: Any) -> memoryview:
        """The bytes of a tensor, row-major and little-endian, shared with it where they can be."""

    @abstractmethod
    def view(self, buffers: bytearray, start: int, form: Form) -> Any:
        """The tensor whose bytes begin at ``start``, sharing them."""

    @abstractmethod
    def pack_bits(self, mask: Any) -> Any:
        """Eight elements of a bool tensor a byte, the first one in the highest bit: uint8, one dimension."""

    @abstractmethod
    def unpack_bits(self, packed: Any, shape: list[int]) -> Any:
        """The reverse of `pack_bits`."""

    @abstractmethod
    def not_finite(self, array: Any) -> int:
        """How many values are NaN or infinite; of integers, none."""
