from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hosfl_lightning import rng
from hosfl_lightning.rng import Domain, Stream, direction, philox4x32, words

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
ONES = 0xFFFFFFFF
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (PI, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# Counter, key, words, first 32 signs, SHA-256 of the bits of 2^20 elements from that block on, least significant first.
GOLDEN = {
    "zero": (
        "00000000 00000000 00000000 00000000 | 00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "-+-+-+--+++-+------++-+++--++--+",
        "fb7c421d739c828fd0786ca7967ad5767b28182891502fe9ab16e8fc3e43abe1",
    ),
    "fields": (
        "00000000 00010005 00009003 0000004d | 89abcdef 01234567",
        "faa08230 3a1f4048 9943eb13 c1b0ebe5",
        "++++--+++-+++++-+++++-+-+-+-----",
        "80b8ae56e1ce2fe12cec760ac7953b45fcae5c04e564b3f2c27334291b4ddaa5",
    ),
    "far block": (
        "00000007 01010005 00009003 0000004d | 89abcdef 01234567",
        "ee78cf79 d4e607dd b6866b13 9e988832",
        "-++----+----++--+++----++---+---",
        "11358b2680c05a47f71d9a916bb91314372c62e9c94066aa0ce66cadd72b3869",
    ),
    "maximum": (
        "00000000 00ffffff ffffffff ffffffff | ffffffff ffffffff",
        "343a7136 aecde2c6 4ed09eec 721315cb",
        "+--+--++-+++---++-+---++++-+--++",
        "ff508c93665d2753297c4485ce1ac2b189855c2f3762191c9716f227e0da5e25",
    ),
}
# The counter's client field is 9, which is client 8.
FIELDS = Stream(0x0123456789ABCDEF, Domain.RADEMACHER, round=77, client=8, probe=3)


def hexadecimal(values: Any) -> str:
    return " ".join(f"{int(v):08x}" for v in values)


def sha256_of_bits(bits: torch.Tensor) -> str:
    packed = bits.view(-1, 8).long() @ (1 << torch.arange(8))
    return hashlib.sha256(bytes(packed.tolist())).hexdigest()


def signs(bits: torch.Tensor) -> str:
    return "".join("+-"[int(bit)] for bit in bits[:32])


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert hexadecimal(philox4x32(c0, c1, c2, c3, *key)) == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name: str) -> None:
    (counter_and_key, first_words, first_signs, sha) = GOLDEN[name]
    counter, key = ([int(h, 16) for h in part.split()] for part in counter_and_key.split("|"))
    blocks = torch.arange(2**20 // 128)
    c0, c1, c2, c3 = (torch.full_like(blocks, c) for c in counter)
    result = torch.stack(philox4x32(c0 + blocks, c1, c2, c3, key[0], key[1]), dim=-1)
    bits = (result[..., None] >> torch.arange(32) & 1).flatten()
    assert hexadecimal(result[0]) == first_words
    assert signs(bits) == first_signs
    assert sha256_of_bits(bits) == sha


@pytest.mark.parametrize(("name", "block"), [("fields", 0), ("far block", 2**32 + 7)])
def test_golden_vectors_through_the_stream(name: str, block: int) -> None:
    _, first_words, first_signs, sha = GOLDEN[name]
    assert hexadecimal(words(FIELDS, 5, torch.tensor([block]))[0]) == first_words
    bits = direction(FIELDS, 5, block << 7, (block << 7) + 2**20) < 0
    assert signs(bits) == first_signs
    assert sha256_of_bits(bits) == sha


def test_random_counters_equal_integer_arithmetic(philox: Callable[..., tuple[int, ...]]) -> None:
    draw = random.Random(0)
    for _ in range(20):
        key = draw.getrandbits(32), draw.getrandbits(32)
        counters = [tuple(draw.getrandbits(32) for _ in range(4)) for _ in range(50)]
        c0, c1, c2, c3 = torch.tensor(counters).unbind(1)
        result = torch.stack(philox4x32(c0, c1, c2, c3, *key), dim=-1)
        assert [tuple(row) for row in result.tolist()] == [philox(counter, key) for counter in counters]


def test_counters_of_different_fields_never_meet() -> None:
    def one_bit_each(bits: int) -> list[int]:
        return [0, *(1 << i for i in range(bits))]

    base: dict[str, Any] = {"domain": Domain.RADEMACHER, "round": 1, "client": 2, "probe": 4, "tensor": 8, "block": 16}
    values: dict[str, list[Any]] = {
        "domain": list(Domain),
        "round": one_bit_each(32),
        "client": [None, *one_bit_each(19)],
        "probe": one_bit_each(12),
        "tensor": one_bit_each(16),
        "block": one_bit_each(40),
    }
    places = {
        tuple((base | {a: x, b: y}).values())
        for (a, xs), (b, ys) in itertools.combinations(values.items(), 2)
        for x, y in itertools.product(xs[:6] + xs[-3:], ys[:6] + ys[-3:])
    } | {tuple((base | {a: x}).values()) for a, xs in values.items() for x in xs}
    made = set()
    for domain, round_, client, probe, tensor, block in places:
        stream = Stream(3, domain, round=round_, client=client, probe=probe)
        made.add(tuple(words(stream, tensor, torch.tensor([block]))[0].tolist()))
    assert len(made) == len(places)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("domain", 0),
        ("domain", 8),
        ("round", -1),
        ("round", 2**32),
        ("client", -1),
        ("client", 2**20 - 1),
        ("client", True),
        ("probe", -1),
        ("probe", 2**12),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    fields = {"seed": 2**64 - 1, "domain": Domain.RADEMACHER, "round": 2**32 - 1, "client": 2**20 - 2, "probe": 4095}
    Stream(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=field):
        Stream(**fields | {field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [-1, 2**40])
def test_a_block_out_of_range_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        words(FIELDS, 0, torch.tensor([0, block]))


@pytest.mark.parametrize("tensor", [-1, 2**16])
def test_a_tensor_out_of_range_is_refused(tensor: int) -> None:
    with pytest.raises(ValueError, match="tensor"):
        words(FIELDS, tensor, torch.tensor([0]))


def test_blocks_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        words(FIELDS, 0, torch.tensor([0], dtype=torch.int32))


def test_domains_are_those_of_the_standard() -> None:
    names = ["RADEMACHER", "GAUSS16", "CLIENT_SAMPLING", "DATA_ORDER", "COORDINATES", "ROUNDING", "SHIFT"]
    assert [int(getattr(rng, name)) for name in names] == [1, 2, 3, 4, 5, 6, 7]
    assert rng.DISTRIBUTIONS == {"rademacher": 1, "gauss16": 2}
