"""The generator in numpy, at the golden vectors of the standard; runs without PyTorch."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from hosfl_client.rng import (
    DISTRIBUTIONS,
    Domain,
    Stream,
    Uniform16,
    add_direction,
    direction,
    distributions,
    permutation,
    round_coefficient,
    round_coefficients,
    sums,
    uniform16,
)
from hosfl_client.rng.philox import rounds

GOLDEN = json.loads((Path(__file__).parent / "golden_rng.json").read_text())
#: Counter, key and words: three of Random123's own, and the four of the directions.
WORDS = [
    ("00000000 00000000 00000000 00000000 | 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff | ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344 | a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ("00000000 00010005 00009003 0000004d | 89abcdef 01234567", "faa08230 3a1f4048 9943eb13 c1b0ebe5"),
    ("00000007 01010005 00009003 0000004d | 89abcdef 01234567", "ee78cf79 d4e607dd b6866b13 9e988832"),
    ("00000000 00ffffff ffffffff ffffffff | ffffffff ffffffff", "343a7136 aecde2c6 4ed09eec 721315cb"),
]
#: First block, first signs, SHA-256 of the bits of 2^20 elements from that block on, least significant first.
SIGNS = [
    (0, "++++--+++-+++++-+++++-+-+-+-----", "80b8ae56e1ce2fe12cec760ac7953b45fcae5c04e564b3f2c27334291b4ddaa5"),
    ((1 << 32) + 7, "-++----+----++--+++----++---+---",
     "11358b2680c05a47f71d9a916bb91314372c62e9c94066aa0ce66cadd72b3869"),
]  # fmt: skip
FIELDS = Stream(0x0123456789ABCDEF, Domain.RADEMACHER, round=77, client=8, probe=3)
GAUSS = Stream(5, Domain.GAUSS16, round=2, probe=1)


def sha(x: np.ndarray) -> str:
    return hashlib.sha256(x.tobytes()).hexdigest()


@pytest.mark.parametrize(("counter", "words"), WORDS)
def test_words(counter: str, words: str) -> None:
    c0, c1, c2, c3, k0, k1 = (int(word, 16) for word in counter.replace("|", "").split())
    even, odd = (np.array([[low] * 3, [high] * 3], np.uint64) for low, high in ((c0, c2), (c1, c3)))
    even, odd = rounds(even, odd, np.empty_like(even), (k0, k1))
    found = [even[0, 2], odd[0, 2] & np.uint64(0xFFFFFFFF), even[1, 2], odd[1, 2] & np.uint64(0xFFFFFFFF)]
    assert " ".join(f"{int(word):08x}" for word in found) == words


@pytest.mark.parametrize(("block", "signs", "digest"), SIGNS)
def test_signs(block: int, signs: str, digest: str) -> None:
    u = direction(FIELDS, 5, block << 7, (block << 7) + (1 << 20))
    assert "".join("+" if value > 0 else "-" for value in u[:32]) == signs
    assert hashlib.sha256(np.packbits(u < 0, bitorder="little").tobytes()).hexdigest() == digest


def test_what_else_is_drawn() -> None:
    """Made by PyTorch: see test_same_as_torch."""
    assert sha(direction(GAUSS, 3, 5, 40_005)) == GOLDEN["gauss16"]
    assert sha(uniform16(Stream(7, Domain.ROUNDING, 1, 2, 3), 1, 40_003)) == GOLDEN["uniform16"]
    assert sha(permutation(20_001, 7, Domain.DATA_ORDER, round=3, client=2)) == GOLDEN["permutation"]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_cut_shows(name: str) -> None:
    stream = Stream(5, DISTRIBUTIONS[name], round=2, probe=1)
    whole = direction(stream, 3, 0, 70_000)
    for start, stop in [(0, 0), (0, 1), (127, 129), (9, 5000), (32_760, 69_999)]:
        assert (direction(stream, 3, start, stop) == whole[start:stop]).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("probes", [1, 3, 40])
def test_many_tensors_and_probes_together_are_each_alone(name: str, probes: int) -> None:
    """Added in the order of the probes, each from its own direction."""
    streams = [Stream(5, DISTRIBUTIONS[name], round=2, probe=p) for p in range(probes)]
    alphas = [0.5 + p / 8 for p in range(probes)]
    pieces = [(0, 0, 1), (4, 3, 300), (1, 0, 0), (2, 0, 40_000), (3, 500, 1000)]
    found = [np.full(stop - start, np.nan, np.float32) for _, start, stop in pieces]
    for i, position, part in sums(streams, alphas, pieces):
        found[i][position : position + len(part)] = part
    for (tensor, start, stop), total in zip(pieces, found):
        wanted = np.zeros(stop - start, np.float32)
        for stream, alpha in zip(streams, alphas):
            wanted = wanted + direction(stream, tensor, start, stop) * np.float32(alpha)
        assert (total == wanted).all()


def test_uniform_numbers_begin_anywhere() -> None:
    stream = Stream(7, Domain.ROUNDING, 1, 2, 3)
    whole, uniform = uniform16(stream, 1, 40_003), Uniform16(stream, 1)
    for start, count in [(0, 0), (0, 1), (1, 8), (7, 40_000 - 7), (32_767, 2)]:
        assert (uniform.fill(np.empty(count, np.float32), start) == whole[start : start + count]).all()
    assert 0 < whole.min() < 1e-4 and 1 - 1e-4 < whole.max() < 1


def test_a_coefficient_is_rounded_once() -> None:
    ties = [1 + 2**-16, 1 + 3 * 2**-16]
    alphas = np.array([0.1, -1 / 3, 1e-3, 12345.678, 1e-30, 0.0, *ties], np.float32)
    for domain in DISTRIBUTIONS.values():
        assert round_coefficients(alphas, domain).tolist() == [round_coefficient(float(a), domain) for a in alphas]
    assert round_coefficient(1 + 2**-15, Domain.GAUSS16) == 1 + 2**-15
    assert round_coefficient(1 + 2**-16, Domain.GAUSS16) == 1
    nan = np.array([0x7FFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(round_coefficients(nan, Domain.GAUSS16)).all()
    for wrong in (float("nan"), 1e39):
        with pytest.raises(ValueError, match="finite"):
            round_coefficient(wrong, Domain.RADEMACHER)


def test_what_is_out_of_range_is_refused() -> None:
    for settings in ({"seed": -1}, {"round": 1 << 32}, {"client": (1 << 20) - 1}, {"probe": 1 << 12}, {"domain": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Stream(**({"seed": 0, "domain": Domain.RADEMACHER} | settings))  # type: ignore[arg-type]
    for tensor, start, stop in [(1 << 16, 0, 1), (0, -1, 1), (0, 0, (1 << 47) + 1)]:
        with pytest.raises(ValueError, match="must be an integer"):
            next(iter(sums([FIELDS], [1.0], [(tensor, start, stop)])))
    with pytest.raises(ValueError, match="domain"):
        direction(Stream(0, Domain.ROUNDING), 0, 0, 1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_scratch_is_small(name: str) -> None:
    stream, out = Stream(5, DISTRIBUTIONS[name]), np.zeros(1 << 20, np.float32)
    add_direction(out, 1.0, stream, 0)  # whose tables stay
    tracemalloc.start()
    add_direction(out, 1.0, stream, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 900 << 10


def test_a_damaged_table_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = bytearray((files("hosfl_client") / "assets" / "gauss16.safetensors").read_bytes())
    content[-12345] ^= 1
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "gauss16.safetensors").write_bytes(content)
    monkeypatch.setattr(distributions, "files", lambda package: tmp_path)
    distributions.gauss16_table.cache_clear()
    with pytest.raises(RuntimeError, match="damaged"):
        distributions.gauss16_table()
