from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from hosfl_lightning.rng import Domain, Stream, uniform16
from hosfl_lightning.wire import (
    CODECS,
    Coded,
    FieldError,
    Multiplier,
    ProbedData,
    SmashedData,
    decode,
    encode,
    encoded_size,
)
from hosfl_lightning.wire.codecs import _up_to_bf16
from tests.wire.samples import FLOATS, STREAM, finite_bits, same

INTEGERS = {"int8": 127, "int4": 7}
MASK = torch.tensor([[True, True, False], [True, True, True]])


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _coded(x: Tensor, codec: str, round: int = 0) -> Coded:
    return Coded.of(x, codec, Stream(1, Domain.ROUNDING, round, client=3), 0)


def _integers(coded: Coded) -> Tensor:
    """(n, h) integers q, unpacked one by one."""
    if coded.codec == "int8":
        return coded.values.int()
    rows = [[nibble for byte in row for nibble in (byte & 15, byte >> 4)] for row in coded.values.tolist()]
    return torch.tensor([[(v ^ 8) - 8 for v in row[: coded.width]] for row in rows], dtype=torch.int32)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp32_is_bit_for_bit_in_the_dtype_it_has(dtype: torch.dtype) -> None:
    x = finite_bits(0, 5, 7, dtype=dtype)
    coded = _coded(x, "fp32")
    assert same(coded.values, x)
    assert same(coded.restore(), x)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_comes_back_has_the_dtype_and_the_shape_it_had(codec: str, dtype: torch.dtype) -> None:
    for shape in [(0, 3), (1, 1), (4, 7), (3, 8)]:
        back = _coded(_normal(0, *shape).to(dtype), codec).restore()
        assert (back.dtype, back.shape) == (dtype, shape)


@pytest.mark.parametrize(("codec", "relative"), [("bf16", 2**-8), ("fp16", 2**-11)])
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_rounding_to_nearest_is_that_near(codec: str, relative: float, scale: float) -> None:
    x = _normal(0, 50, 40, scale=scale)
    coded = _coded(x, codec)
    absolute = 0.0 if coded.scale is None else coded.scale.item() * 2**-25
    assert ((coded.restore() - x).abs() <= (relative * x.abs()).clamp(min=absolute)).all()


def test_bf16_is_torchs_rounding() -> None:
    x = _normal(3, 20, 30)
    assert same(_coded(x, "bf16").restore(), x.bfloat16().float())


@pytest.mark.parametrize("exponent", [-100, -60, -30, -14, 0, 14, 100])
def test_fp16_neither_underflows_nor_overflows_and_its_scale_is_exact(exponent: int) -> None:
    x = _normal(1, 20, 30).half().float()
    moved = x * 2.0**exponent
    coded = _coded(moved, "fp16")
    assert coded.scale is not None
    assert math.frexp(coded.scale.item())[0] == 0.5
    assert 2**14 <= coded.values.float().abs().max() < 2**15
    assert torch.equal(coded.restore(), moved)
    if exponent <= -30:
        assert not moved.half().any()  # what it is there for


def test_fp16_of_zeros_and_of_the_extremes() -> None:
    assert not _coded(torch.zeros(2, 3), "fp16").restore().any()
    least = torch.full((1, 1), 2.0**-149)
    assert torch.equal(_coded(least, "fp16").restore(), least)
    large = torch.tensor([[torch.finfo(torch.float32).max, -1e38]])
    assert torch.allclose(_coded(large, "fp16").restore(), large, rtol=2**-11)


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e30])
def test_an_integer_codec_is_off_by_less_than_its_scale(codec: str, scale: float) -> None:
    x = _normal(0, 40, 33, scale=scale)
    coded = _coded(x, codec)
    assert coded.scale is not None
    s = coded.scale.double()[:, None]
    assert ((coded.restore().double() - x.double()).abs() < s).all()
    assert torch.equal(coded.restore().double(), _integers(coded) * s)


@pytest.mark.parametrize("codec", INTEGERS)
def test_the_scale_is_rounded_up_and_nothing_clips(codec: str) -> None:
    x = _normal(2, 3000, 5)
    coded = _coded(x, codec)
    assert coded.scale is not None
    ratio = coded.scale.double() * INTEGERS[codec] / x.double().abs().amax(1)
    assert ratio.min() > 1 - 2**-24  # the quotient is rounded to fp32 before it is rounded up
    assert ratio.max() < 1 + 2**-7
    assert _integers(coded).abs().max() == INTEGERS[codec]
    exact = torch.arange(-INTEGERS[codec], INTEGERS[codec] + 1).float()[None]
    for power in (-40, 0, 7):
        assert torch.equal(_coded(exact * 2.0**power, codec).restore(), exact * 2.0**power)


@pytest.mark.parametrize("codec", INTEGERS)
def test_it_is_the_floor_of_the_quotient_plus_the_streams_uniform(codec: str) -> None:
    x = _normal(4, 6, 5)
    for tensor, round in [(0, 0), (1, 0), (1, 9)]:
        stream = Stream(7, Domain.ROUNDING, round, client=2)
        coded = Coded.of(x, codec, stream, tensor)
        assert coded.scale is not None
        r = uniform16(stream, tensor, 30).view(6, 5)
        for q, value, s, u in zip(
            _integers(coded).flatten().tolist(),
            x.flatten().tolist(),
            coded.scale.repeat_interleave(5).tolist(),
            r.flatten(),
        ):
            assert q == math.floor(value / s + u.item())


@pytest.mark.parametrize("codec", INTEGERS)
def test_the_mean_over_rounds_is_the_value(codec: str) -> None:
    x = _normal(5, 8, 16)
    rounds = 500
    total = torch.zeros(8, 16, dtype=torch.float64)
    for round in range(rounds):
        total += _coded(x, codec, round).restore().double()
    scale = _coded(x, codec).scale
    assert scale is not None
    off = (total / rounds - x.double()) / scale.double()[:, None]
    deviation = 0.5 / math.sqrt(rounds)  # at most, of one element
    assert off.abs().max() < 4.5 * deviation
    assert off.mean().abs() < 4.5 * deviation / math.sqrt(x.numel())


@pytest.mark.parametrize("codec", INTEGERS)
def test_a_zero_row_stays_zero(codec: str) -> None:
    x = _normal(6, 4, 9)
    x[1], x[2] = 0.0, 2.0**-149
    coded = _coded(x, codec)
    assert coded.scale is not None
    assert coded.scale[1] == 0.0
    assert not _integers(coded)[1:3].any()
    assert not coded.restore()[1:3].any()
    assert coded.restore()[3].any()


@pytest.mark.parametrize("codec", INTEGERS)
def test_a_coarse_scale_does_not_turn_the_sign(codec: str) -> None:
    value = (INTEGERS[codec] * 65536 + 3) * 2.0**-149  # over the least bf16 number a little more than the codec holds
    coded = _coded(torch.full((1, 1 << 17), value), codec)
    assert set(_integers(coded).unique().tolist()) == {INTEGERS[codec]}


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF], ids=["CPU", "CUDA"])
def test_a_scale_that_is_nan_stays_so(bits: int) -> None:
    assert _up_to_bf16(torch.tensor([bits], dtype=torch.int32).view(torch.float32)).isnan().all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_numbers_come_back_finite(codec: str, dtype: torch.dtype) -> None:
    if (codec, dtype) == ("bf16", torch.float32):
        return  # beyond bf16's largest number there is only infinity, which the receiver refuses
    top = torch.finfo(dtype).max
    for round in range(20):
        x = torch.tensor([[top, -top, top / 2]], dtype=dtype)
        assert _coded(x, codec, round).restore().isfinite().all()


@pytest.mark.parametrize("codec", INTEGERS)
def test_seed_round_client_step_and_tensor_each_change_the_rounding(codec: str) -> None:
    x = _normal(7, 2, 3, 32)
    mask = torch.ones(2, 3, dtype=torch.bool)

    def z(round: int = 0, client: int = 0, seed: int = 0, step: int = 0) -> Tensor:
        return SmashedData.pack(round, client, x, torch.ones(2), mask, codec, seed, step).z.restore()

    def probed(probe: int, side: int, **kwargs: int) -> Tensor:
        return ProbedData.pack(kwargs.pop("round", 0), 0, probe, side, x, mask, codec, **kwargs).z.restore()

    drawn = [z(), z(round=1), z(client=1), z(seed=1), z(step=1), z(step=2)]
    drawn += [Multiplier.pack(0, 0, x, mask, codec, step=step).multiplier.restore() for step in range(3)]
    drawn += [probed(probe, side) for probe in range(3) for side in range(2)]
    drawn += [probed(0, 0, round=1), probed(0, 0, seed=1), probed(0, 0, step=1), probed(0, 0, step=2)]
    assert torch.equal(z(), drawn[0])
    assert torch.equal(probed(1, 1), drawn[12])
    assert not any(torch.equal(one, other) for one, other in combinations(drawn, 2))


@pytest.mark.parametrize("codec", INTEGERS)
def test_the_z_of_a_probe_takes_the_place_that_is_its_own(codec: str) -> None:
    x, mask = _normal(7, 2, 3, 32), torch.ones(2, 3, dtype=torch.bool)
    for probe, side, step in [(0, 0, 0), (0, 1, 5), (4095, 1, 4095)]:
        message = ProbedData.pack(6, 3, probe, side, x, mask, codec, 9, step)
        stream = Stream(9, Domain.ROUNDING, 6, 3, step)
        assert same(message.z, Coded.of(x.flatten(0, 1), codec, stream, 2 + 2 * probe + side))


def test_a_local_step_beyond_the_counter_is_refused() -> None:
    for step in (-1, 4096):
        for pack in (
            lambda step: SmashedData.pack(0, 0, torch.ones(2, 3, 1), torch.ones(2), MASK, step=step),
            lambda step: Multiplier.pack(0, 0, torch.ones(2, 3, 1), MASK, step=step),
            lambda step: ProbedData.pack(0, 0, 0, 0, torch.ones(2, 3, 1), MASK, step=step),
        ):
            assert pack(4095)
            with pytest.raises(FieldError, match=rf"step must be in 0 \.\. 4095, got {step}"):
                pack(step)


@pytest.mark.parametrize("codec", CODECS)
def test_handed_over_or_serialised_a_message_means_the_same(codec: str) -> None:
    x = _normal(8, 2, 3, 5)
    smashed = SmashedData.pack(4, 1, x, torch.tensor([3, 2]), MASK, codec, seed=9)
    multiplier = Multiplier.pack(4, 1, x, MASK, codec, seed=9)
    probed = ProbedData.pack(4, 1, 2, 1, x, MASK, codec, seed=9)
    received = decode(encode(smashed)), decode(encode(multiplier)), decode(encode(probed))
    assert isinstance(received[0], SmashedData)
    assert isinstance(received[1], Multiplier)
    assert all(map(same, received[0].unpack(), smashed.unpack()))
    assert isinstance(received[2], ProbedData)
    assert same(received[1].unpack(MASK), multiplier.unpack(MASK))
    assert same(received[2].unpack(MASK), probed.unpack(MASK))


def test_what_a_codec_saves() -> None:
    x, mask = torch.ones(4, 32, 768), torch.ones(4, 32, dtype=torch.bool)
    sizes = {codec: encoded_size(Multiplier.pack(0, 0, x, mask, codec)) for codec in CODECS}
    header = 400
    assert sizes["fp32"] - header < 4 * x.numel() < sizes["fp32"]
    assert sizes["bf16"] - header < 2 * x.numel()
    assert sizes["fp16"] - header < 2 * x.numel()
    assert sizes["int8"] - header < x.numel() + 2 * mask.numel()
    assert sizes["int4"] - header < x.numel() // 2 + 2 * mask.numel()


def test_a_bf16_tensor_is_never_widened() -> None:
    x, mask = torch.ones(1, 2, 100, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bool)
    assert Multiplier.pack(0, 0, x, mask).multiplier.values.dtype == torch.bfloat16


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(FieldError, match=r"codec must be one of fp32, bf16, fp16, int8, int4, ternary.*got 'int2'"):
        Coded.of(torch.ones(1, 1), "int2", STREAM, 0)
    with pytest.raises(FieldError, match="int64"):
        Coded.of(torch.ones(1, 1).long(), "int8", STREAM, 0)
