"""The messages of a round whose labels stay with the clients: `hosfl_client.wire.u_shape` says what is in them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hosfl_client.padding import rounding_stream
from hosfl_client.wire.u_shape import MiddleOutputFields, OutputMultiplierFields, Rows, UnlabelledDataFields
from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.padding import pack_rows, unpack_rows

_ROWS = Rows(pack_rows, unpack_rows, rounding_stream)


@dataclass(frozen=True, eq=False)
class UnlabelledData(UnlabelledDataFields):
    """z₁ and the mask, and no labels."""

    rows = _ROWS
    z: Coded
    mask: Tensor


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
