"""Rebuild the table of the gauss16 distribution: ``python tools/make_gauss16_table.py``.

Entry h of 65,536 is the inverse normal CDF at (h + 1/2) / 65536, computed in float64 and rounded once, to nearest even,
to bfloat16. Prints the SHA-256 of the little-endian bytes, which ``hosfl_lightning.rng.directions`` checks on load.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import struct
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors.torch import save

ENTRIES = 1 << 16
SIGNIFICANT_BITS = 8


def round_to_bfloat16(x: float) -> float:
    """Nearest bfloat16, ties to even (the table's values are far from bfloat16's underflow and overflow)."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, SIGNIFICANT_BITS)), exponent - SIGNIFICANT_BITS)


def make_table() -> torch.Tensor:
    """The (65536,) bfloat16 table."""
    inv_cdf = NormalDist().inv_cdf
    values = [round_to_bfloat16(inv_cdf((h + 0.5) / ENTRIES)) for h in range(ENTRIES)]
    return torch.tensor(values, dtype=torch.bfloat16)


def main() -> None:
    """Write the table and print its hash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "client" / "hosfl_client" / "assets" / "gauss16.safetensors"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    table = make_table()
    bits = [b & 0xFFFF for b in table.view(torch.int16).tolist()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(save({"gauss16": table}))
    print(args.out, hashlib.sha256(struct.pack(f"<{ENTRIES}H", *bits)).hexdigest())


if __name__ == "__main__":
    main()
