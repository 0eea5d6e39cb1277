"""The codecs in numpy, at what PyTorch made of the same rows; runs without PyTorch."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hosfl_client.bfloat16 import BFLOAT16, DTYPES, cast, narrow, widen
from hosfl_client.codecs import CODECS, KNOWN, Coded
from hosfl_client.rng import Domain, Stream
from hosfl_client.wire.errors import FieldError

CONTENT = (Path(__file__).parent / "golden_codecs.json").read_bytes()
GOLDEN = json.loads(CONTENT)
DIGEST = "247f1f199a88a865fc0165b8aa81f147ee51722509a3e0a6a2d7a4ec70c6a76a"
STREAM = Stream(9, Domain.ROUNDING, 3, 2, 1)


def golden_rows(dtype: str) -> Any:
    """Rows of 23 numbers from the least to the largest, and one of zeros."""
    x = np.frombuffer(bytes.fromhex(GOLDEN["rows"]), "<f4").reshape(-1, 23)
    largest = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}.get(dtype, np.finfo(np.float32).max)
    return cast(np.clip(x, -np.float32(largest), np.float32(largest)), np.empty(x.shape, DTYPES[dtype]))


def test_the_file_is_the_one_that_was_made() -> None:
    """Whoever changes a codec changes the file, and its digest here."""
    assert hashlib.sha256(CONTENT).hexdigest() == DIGEST


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_golden_rows(codec: str, dtype: str) -> None:
    coded, wanted = Coded.of(golden_rows(dtype), codec, STREAM, 1), GOLDEN["coded"][codec][dtype]
    assert coded.dtype == dtype and coded.width == 23
    assert coded.values.tobytes().hex() == wanted["values"]
    assert (None if coded.scale is None else coded.scale.tobytes().hex()) == wanted["scale"]
    restored = coded.restore()
    assert restored.dtype == DTYPES[dtype]
    assert hashlib.sha256(restored.tobytes()).hexdigest() == wanted["restored"]


@pytest.mark.parametrize("codec", CODECS)
def test_chunks_of_rows_do_not_show(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Coded.of(golden_rows("bfloat16"), codec, STREAM, 1)
    monkeypatch.setattr("hosfl_client.codecs.ELEMENTS", 50)  # two rows at a time
    parts = Coded.of(golden_rows("bfloat16"), codec, STREAM, 1)
    assert parts.values.tobytes() == whole.values.tobytes()
    restored, out = whole.restore(), np.empty((3, 23), BFLOAT16)
    assert parts.restore_rows(1, 4, out) is out
    assert out.tobytes() == restored[1:4].tobytes()
    assert parts.restore(np.empty_like(restored)).tobytes() == restored.tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_scratch_is_small(codec: str) -> None:
    x = np.random.default_rng(0).standard_normal((2048, 256), np.float32)
    Coded.of(x, codec, STREAM, 1).restore()
    tracemalloc.start()
    coded = Coded.of(x, codec, STREAM, 1)
    above = tracemalloc.get_traced_memory()[1] - coded.values.nbytes
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    back = coded.restore()
    restored = tracemalloc.get_traced_memory()[1] - before - back.nbytes
    tracemalloc.stop()
    assert max(above, restored) < 1 << 20


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_shows(codec: str, wrong: float) -> None:
    x = np.ones((3, 7), np.float32)
    x[1, 2] = wrong
    coded = Coded.of(x, codec, STREAM, 1)
    floats = [part for part in (coded.values, coded.scale) if part is not None and part.dtype in DTYPES.values()]
    assert not all(np.isfinite(widen(part)).all() for part in floats)


def test_no_rows_and_no_such_codec() -> None:
    for codec in CODECS:
        assert Coded.of(np.empty((0, 3), np.float16), codec, STREAM, 0).restore().shape == (0, 3)
    for x, codec in [
        (np.ones((2, 2), np.float32), "int2"),
        (np.ones(2, np.float32), "int8"),
        (np.ones((2, 2)) > 0, "int8"),
    ]:
        with pytest.raises(FieldError):
            Coded.of(x, codec, STREAM, 0)
    assert not {name for name, codec in KNOWN.items() if codec.biased} - {"ternary"}


def test_memory_is_told_beforehand() -> None:
    coded = Coded.of(np.ones((4, 6), np.float16), "int8", STREAM, 0)
    assert (coded.row_bytes(), coded.restored_bytes()) == (24, 96)


def test_bfloat16_is_the_upper_half_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00008001, 0x80000000, 0x7F800001], np.uint32)
    found = narrow(bits.view(np.float32))
    assert [*found["bfloat16"][:-1]] == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x0001, 0x8000]
    assert np.isnan(widen(found)[-1])
    every = np.arange(1 << 16, dtype=np.uint16).view(BFLOAT16)
    number = ~np.isnan(widen(every))
    assert (narrow(widen(every))["bfloat16"] == every["bfloat16"])[number].all()
