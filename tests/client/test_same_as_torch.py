"""The arithmetic in numpy beside that in PyTorch: the same bits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hosfl_client import codecs, rng  # noqa: E402
from hosfl_client.bfloat16 import BFLOAT16  # noqa: E402
from hosfl_lightning import rng as torch_rng  # noqa: E402
from hosfl_lightning.wire import CODECS, Coded  # noqa: E402
from tests.client.golden import DTYPES, FOLDER, golden_codecs, golden_rng, raw  # noqa: E402


def of_torch(x: Any) -> Any:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16).view(BFLOAT16)
    return x.numpy()


def test_golden_files_are_torchs() -> None:
    assert json.loads((FOLDER / "golden_rng.json").read_text()) == golden_rng()
    assert json.loads((FOLDER / "golden_codecs.json").read_text()) == golden_codecs()


def test_the_table_is_the_same_file() -> None:
    paths = [
        FOLDER.parents[1] / folder / "assets" / "gauss16.safetensors"
        for folder in ("hosfl_lightning", "client/hosfl_client")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", rng.DISTRIBUTIONS)
def test_directions(name: str) -> None:
    fields = {"seed": 0xFEDCBA9876543210, "round": 70_000, "client": 12, "probe": 4}
    ours = rng.Stream(domain=rng.DISTRIBUTIONS[name], **fields)
    theirs = torch_rng.Stream(domain=torch_rng.DISTRIBUTIONS[name], **fields)
    for start, stop in [(0, 100_001), (13, 14), ((1 << 35) - 100, (1 << 35) + 1000)]:
        out = np.linspace(-1, 1, stop - start, dtype=np.float32)
        wanted = torch.from_numpy(out.copy())
        rng.add_direction(out, 1e-3, ours, 65_535, start)
        torch_rng.add_direction_(wanted, 1e-3, theirs, 65_535, start)
        assert out.tobytes() == raw(wanted)


def rows(count: int, width: int, dtype: Any) -> Any:
    """Of all magnitudes, as far as the dtype goes."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    powers = torch.tensor([0.0, -100, 100, -139, 127, -127, -20])
    x = x * torch.exp2(powers.repeat(count // 7 + 1)[:count, None])
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.clamp(-largest, largest).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_codecs(codec: str, dtype: Any) -> None:
    fields = {"seed": 9, "round": 3, "client": 2, "probe": 1}
    for count, width in [(0, 3), (1, 1), (50, 129), (21, 4000)]:
        x = rows(count, width, dtype)
        ours = codecs.Coded.of(of_torch(x), codec, rng.Stream(domain=rng.Domain.ROUNDING, **fields), 1)
        theirs = Coded.of(x, codec, torch_rng.Stream(domain=torch_rng.Domain.ROUNDING, **fields), 1)
        assert ours.values.tobytes() == raw(theirs.values)
        assert theirs.scale is None or (ours.scale is not None and ours.scale.tobytes() == raw(theirs.scale))
        assert ours.restore().tobytes() == raw(theirs.restore())
        assert (ours.row_bytes(), ours.restored_bytes()) == (theirs.row_bytes(), theirs.restored_bytes())
