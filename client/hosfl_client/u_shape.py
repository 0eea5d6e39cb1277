"""The messages of a round whose labels stay with the clients: `hosfl_client.wire.u_shape` says what is in them."""

from __future__ import annotations

from dataclasses import dataclass

from hosfl_client.bfloat16 import Array
from hosfl_client.codecs import Coded
from hosfl_client.padding import pack_rows, rounding_stream, unpack_rows
from hosfl_client.wire.u_shape import MiddleOutputFields, OutputMultiplierFields, Rows, UnlabelledDataFields

_ROWS = Rows(pack_rows, unpack_rows, rounding_stream)


@dataclass(frozen=True, eq=False)
class UnlabelledData(UnlabelledDataFields):
    """z₁ and the mask, and no labels."""

    rows = _ROWS
    z: Coded
    mask: Array


@dataclass(frozen=True, eq=False)
class MiddleOutput(MiddleOutputFields):
    """z₂."""

    rows = _ROWS
    z: Coded


@dataclass(frozen=True, eq=False)
class OutputMultiplier(OutputMultiplierFields):
    """λ₂."""

    rows = _ROWS
    multiplier: Coded
