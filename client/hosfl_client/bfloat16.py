"""bfloat16, which numpy does not know: the upper half of a float32, as a dtype of its own that only moves bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""A record of one field, so that no arithmetic takes its bits for integers."""

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}  # fmt: skip
"""The floating dtypes by the names that messages and manifests give them."""

LARGEST = 3.3895313892515355e38
"""The largest finite bfloat16 number."""


def dtype_name(x: Array) -> str:
    """What messages call the dtype of ``x``.

    Raises:
        TypeError: It is none of `DTYPES`.
    """
    for name, dtype in DTYPES.items():
        if x.dtype == dtype:
            return name
    raise TypeError(f"a floating array is {', '.join(DTYPES)}, got {x.dtype}")


def widen(x: Array, out: Floats | None = None) -> Floats:
    """The same numbers in float32.

    Args:
        x: Of any shape, in one of `DTYPES`; only float64 is rounded, to nearest even.
        out: Of the same shape, float32, to be filled; a new array if None.
    """
    if out is None:
        out = np.empty(x.shape, np.float32)
    if x.dtype == BFLOAT16:
        np.left_shift(x["bfloat16"], np.uint32(16), out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        with np.errstate(over="ignore"):
            np.copyto(out, x, casting="same_kind")
    return out


def narrow(x: Floats, out: Array | None = None) -> Array:
    """To nearest, even where two are as near; NaN stays NaN, and what is too large becomes infinite.

    Args:
        x: float32, any shape.
        out: Of the same shape, `BFLOAT16`, to be filled; a new array if None.
    """
    if out is None:
        out = np.empty(x.shape, BFLOAT16)
    bits = x.view(np.uint32)
    rounded = bits >> np.uint32(16)
    nan = np.isnan(x)
    quiet = rounded[nan] | np.uint32(0x40)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    rounded[nan] = quiet
    np.copyto(out["bfloat16"], rounded, casting="unsafe")
    return out


def cast(x: Floats, out: Array) -> Array:
    """``out ← x`` in the dtype of ``out``, one of `DTYPES`, rounded once to nearest even."""
    if out.dtype == BFLOAT16:
        return narrow(x, out)
    with np.errstate(over="ignore"):
        np.copyto(out, x, casting="same_kind")
    return out
