from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from hosfl_client.wire.checks import PROBES
from hosfl_lightning.rng import Domain, Stream
from hosfl_lightning.wire import (
    CODECS,
    Coded,
    CodedGradient,
    DtypeError,
    FieldError,
    Multiplier,
    NonFiniteError,
    ProbedData,
    ShapeError,
    SmashedData,
    check_finite,
    decode,
    encode,
    encoded_size,
)
from tests.rng.conftest import MemoryMeter
from tests.wire.samples import BASIS, finite_bits, frame, same

LARGEST = {"int8": 127, "int4": 7}


def _gradient(count: int, seed: int = 0) -> Tensor:
    """Rows of very different size, as layers are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=draw) * 10.0 ** -(torch.arange(count) // 128 % 5)


def _packed(g: Tensor, codec: str, round: int = 0, client: int = 3, seed: int = 1) -> CodedGradient:
    return CodedGradient.pack(round, client, BASIS, g, 5, codec, seed)


def _sent(message: CodedGradient) -> CodedGradient:
    received = decode(encode(message))
    assert isinstance(received, CodedGradient)
    return received


def _row_maxima(g: Tensor) -> Tensor:
    """Of each coefficient, the largest magnitude among the 128 that it shares a scale with."""
    return torch.cat([part.abs().amax().expand(len(part)) for part in g.split(128)])


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 256, 1000])
@pytest.mark.parametrize("codec", CODECS)
def test_as_many_coefficients_come_back_as_were_sent_handed_over_or_serialised(codec: str, count: int) -> None:
    message = _packed(_gradient(count), codec)
    assert (message.unpack().shape, message.unpack().dtype) == ((count,), torch.float32)
    assert same(_sent(message).unpack(), message.unpack())
    assert message.unpacked_bytes() >= 4 * count
    assert encoded_size(message) == len(encode(message))


def test_fp32_is_bit_for_bit() -> None:
    bits = finite_bits(0, 300)
    assert same(_packed(bits, "fp32").unpack(), bits)
    assert same(_packed(bits[::2], "fp32").unpack(), bits[::2].contiguous())


@pytest.mark.parametrize(("codec", "relative"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_rounding_to_nearest_is_that_near(codec: str, relative: float) -> None:
    g = _gradient(700)
    floor = 2**-39 * g.abs().amax() if codec == "fp16" else torch.tensor(0.0)  # s 2^-25, and s < 2^-14 max
    assert ((_packed(g, codec).unpack() - g).abs() <= (relative * g.abs()).clamp(min=floor)).all()


@pytest.mark.parametrize("codec", LARGEST)
def test_each_row_of_128_is_off_by_less_than_its_own_scale(codec: str) -> None:
    g = _gradient(1000)
    scale = _row_maxima(g) / LARGEST[codec] * (1 + 2**-7)
    assert ((_packed(g, codec).unpack() - g).abs() < scale).all()


@pytest.mark.parametrize("codec", LARGEST)
@pytest.mark.parametrize("count", [1, 131, 256])
def test_the_mean_over_rounds_is_the_gradient(codec: str, count: int) -> None:
    g, rounds = _gradient(count), 400
    total = torch.stack([_packed(g, codec, round).unpack().double() for round in range(rounds)]).sum(0)
    off = (total / rounds - g) / (_row_maxima(g) / LARGEST[codec])
    assert off.abs().max() < 4.5 * 0.5 / math.sqrt(rounds)  # the deviation is at most half a step
    assert off.mean().abs() < 4.5 * 0.5 / math.sqrt(rounds * count)


@pytest.mark.parametrize("codec", LARGEST)
def test_the_noise_of_one_client_tells_nothing_of_anothers(codec: str) -> None:
    g = _gradient(4096)
    noise = [(_packed(g, codec, client=k).unpack() - g) / _row_maxima(g) for k in range(6)]
    noise += [(_packed(g, codec, round=1, client=0).unpack() - g) / _row_maxima(g)]
    for one, other in combinations(noise, 2):
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
        assert correlation.abs() < 4.5 / math.sqrt(4096)


@pytest.mark.parametrize("codec", LARGEST)
def test_its_noise_is_that_of_no_other_message(codec: str) -> None:
    g = _gradient(128)
    row, mask = g.view(1, 1, 128), torch.ones(1, 1, dtype=torch.bool)
    drawn = [_packed(g, codec, *place).coefficients for place in product((0, 6), (0, 3), (1, 9))]
    for step in (0, 1, 4095):
        drawn.append(SmashedData.pack(6, 3, row, torch.ones(1), mask, codec, 9, step).z)
        drawn.append(Multiplier.pack(6, 3, row, mask, codec, 9, step).multiplier)
        drawn += [
            ProbedData.pack(6, 3, p, side, row, mask, codec, 9, step).z
            for p, side in product((0, 1, PROBES - 1), (0, 1))
        ]
    assert same(_packed(g, codec, 6, 3, 9).coefficients, _packed(g, codec, 6, 3, 9).coefficients)
    assert not any(torch.equal(one.restore(), other.restore()) for one, other in combinations(drawn, 2))


@pytest.mark.parametrize("codec", LARGEST)
def test_its_noise_has_the_last_place_of_the_first_step(codec: str) -> None:
    g = _gradient(300)
    rows = torch.cat([g, torch.zeros(84)]).view(3, 128)
    assert 2 + 2 * (PROBES - 1) + 1 < 65535
    expected = Coded.of(rows, codec, Stream(9, Domain.ROUNDING, 6, client=3, probe=0), 65535)
    assert same(_packed(g, codec, 6, 3, 9).coefficients, expected)


def test_what_a_codec_saves() -> None:
    g, header = torch.ones(8192), 512
    sizes = {codec: encoded_size(_packed(g, codec)) for codec in CODECS}
    for codec, bits in {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8.125, "int4": 4.125, "ternary": 1.75}.items():
        assert 0 < sizes[codec] - bits / 8 * len(g) < header


@pytest.mark.parametrize("codec", CODECS)
def test_what_fills_up_the_last_row_is_zero_and_is_not_read(codec: str) -> None:
    g = _gradient(129)
    message = _packed(g, codec)
    coded = message.coefficients
    assert not coded.restore()[1, 1:].any()
    values = coded.values.clone()
    if codec == "int4":
        values[1, 0] |= 0x70  # the byte that the last coefficient shares
    if codec == "ternary":
        values[1, 0] += 3 + 9 + 27 + 81
    values[1, 1:] = 242 if codec == "ternary" else 0x33
    filled = replace(message, coefficients=replace(coded, values=values))
    assert filled.coefficients.restore()[1, 1:].all()
    assert same(_sent(filled).unpack(), message.unpack())


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"client": -1}, FieldError, "client must be"),
        ({"num_terms": True}, FieldError, "num_terms must be"),
        ({"attempt": -1}, FieldError, "attempt must be"),
        ({"basis": {"a": float("nan")}}, FieldError, r"basis\.a"),
        ({"count": -1}, FieldError, "count must be"),
        ({"count": 129.0}, FieldError, "count must be"),
        ({"count": 1 << 63}, FieldError, "count must be"),
        ({"count": 0}, ShapeError, "a count of 0 needs 0 rows of 128 coefficients, got 2 of 128"),
        ({"count": 128}, ShapeError, "a count of 128 needs 1 rows"),
        ({"count": 257}, ShapeError, "a count of 257 needs 3 rows"),
        ({"codec": "zip"}, FieldError, r"coefficients\.codec must be one of fp32"),
        ({"dtype": "float64"}, DtypeError, r"coefficients\.dtype must be float32, got float64"),
        ({"width": 127, "values": torch.ones(2, 64, dtype=torch.uint8)}, ShapeError, ".* got 2 of 127"),
        ({"width": 64, "values": torch.ones(2, 32, dtype=torch.uint8)}, ShapeError, ".* got 2 of 64"),
        ({"scale": torch.ones(1).bfloat16()}, ShapeError, "coefficients must have 2 scales"),
    ],
)
def test_it_is_checked_when_sent(changes: dict[str, Any], error: type[FieldError], match: str) -> None:
    message = _packed(_gradient(130), "int4")
    assert encode(message)
    coded = {name: value for name, value in changes.items() if name in vars(message.coefficients)}
    others = {name: value for name, value in changes.items() if name not in coded}
    with pytest.raises(error, match=f"coded_gradient: {match}"):
        encode(replace(message, coefficients=replace(message.coefficients, **coded), **others))


def test_what_is_no_vector_of_fp32_is_not_packed() -> None:
    with pytest.raises(ShapeError, match="coded_gradient: coefficients must have 1 dimensions"):
        _packed(torch.ones(2, 128), "int4")
    with pytest.raises(DtypeError, match=r"coded_gradient: coefficients must be torch\.float32, got torch\.float64"):
        _packed(torch.ones(3).double(), "int4")
    with pytest.raises(FieldError, match=r"codec must be one of fp32, bf16, fp16, int8, int4, ternary.*got 'int2'"):
        _packed(torch.ones(3), "int2")


@pytest.mark.parametrize("count", [0, 127, 129, 1 << 40, (1 << 63) - 1])
def test_nothing_is_made_of_a_count_that_the_rows_do_not_have(count: int) -> None:
    coded = {"codec": "int8", "dtype": "float32", "width": 128}
    plain = {"basis": {}, "coefficients": coded, "count": count, "num_terms": 3, "attempt": 0}
    rows = 2 if count == 127 else 1
    buffers = {
        "coefficients.values": torch.zeros(rows, 128, dtype=torch.int8),
        "coefficients.scale": torch.ones(rows).bfloat16(),
    }
    data = frame({"fields": plain, "bits": {}}, buffers, kind=9)
    with MemoryMeter() as meter, pytest.raises(ShapeError, match=f"coded_gradient: a count of {count} needs"):
        decode(data)
    assert meter.peak < 2**12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", CODECS)
def test_one_coefficient_that_is_not_finite_is_refused_also_in_a_row_that_is_not_full(codec: str, bad: float) -> None:
    g = _gradient(130)
    g[129] = bad
    message = _packed(g, codec)
    with pytest.raises(NonFiniteError, match=r"coded_gradient: coefficients\.(values|scale) has \d+ values"):
        check_finite(message)
    with pytest.raises(NonFiniteError, match="coded_gradient"):
        decode(encode(message))
