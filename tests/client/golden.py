"""Golden files of what a client computes, made by PyTorch: ``python -m tests.client.golden`` writes them anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hosfl_lightning.rng import Domain, Stream, direction, permutation, uniform16
from hosfl_lightning.wire import CODECS, Coded

FOLDER = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAGNITUDES = (1.0, 1e-30, 1e30, 1e-42, 3e38, 0.0, 1e-6)


def raw(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def sha(x: Tensor) -> str:
    return hashlib.sha256(raw(x)).hexdigest()


def golden_rng() -> dict[str, str]:
    return {
        "gauss16": sha(direction(Stream(5, Domain.GAUSS16, round=2, probe=1), 3, 5, 40_005)),
        "uniform16": sha(uniform16(Stream(7, Domain.ROUNDING, 1, 2, 3), 1, 40_003)),
        "permutation": sha(permutation(20_001, 7, Domain.DATA_ORDER, round=3, client=2)),
    }


def golden_codecs() -> dict[str, Any]:
    x = np.random.Generator(np.random.Philox(0)).standard_normal((len(MAGNITUDES), 23), np.float32)
    with np.errstate(over="ignore"):
        x = np.nan_to_num(x * np.array(MAGNITUDES, np.float32)[:, None])
    coded: dict[str, Any] = {}
    for codec in CODECS:
        for dtype in DTYPES:
            largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
            rows = torch.from_numpy(x).clamp(-largest, largest).to(dtype)
            made = Coded.of(rows, codec, Stream(9, Domain.ROUNDING, 3, 2, 1), 1)
            coded.setdefault(codec, {})[str(dtype).removeprefix("torch.")] = {
                "values": raw(made.values).hex(),
                "scale": None if made.scale is None else raw(made.scale).hex(),
                "restored": sha(made.restore()),
            }
    return {"rows": x.tobytes().hex(), "coded": coded}


if __name__ == "__main__":
    for name, content in (("rng", golden_rng()), ("codecs", golden_codecs())):
        (FOLDER / f"golden_{name}.json").write_text(json.dumps(content, indent=1) + "\n")
