"""What a codec is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from hosfl_client.bfloat16 import Array, Floats

Uniform = Callable[[], Floats]
"""Draws (n·h,) fp32 in [0, 1) for the rows that are coded."""


class Codec(ABC):
    """How the rows of an (n, h) array travel: as ``values`` of few bits, and a scale for each row or none."""

    #: On the wire.
    name: ClassVar[str]
    #: Of ``values``.
    form: ClassVar[Any] = np.dtype(np.uint8)
    #: Whether each row has a scale of its own.
    by_row: ClassVar[bool] = False
    #: Whether what comes back is off in the mean, and so of no use for z and λ.
    biased: ClassVar[bool] = False

    def columns(self, width: int) -> int:
        """Of ``values``, for rows of ``width`` numbers."""
        return width

    def scales(self, rows: int) -> int | None:
        """How many scales go with so many rows; None: no scale."""
        return None

    @abstractmethod
    def encode(self, x: Floats, uniform: Uniform, values: Array, scale: Array | None) -> None:
        """Fill some rows of ``values``, and their scales; a scale of the whole array is given, and stays."""

    @abstractmethod
    def decode(self, values: Array, scale: Array | None, out: Floats) -> None:
        """Fill ``out``, (n, width) fp32, from some rows."""
