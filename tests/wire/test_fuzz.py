"""Damaged frames: each one is the message that was sent, or is refused by a WireError, within the limit on memory.

Half of them get the SHA-256 of their damaged bytes, or the parser behind the checksum would never be reached. Of those,
any message that passes its own checks will do: who can write a checksum can write a message.

    pytest tests/wire/test_fuzz.py --fuzz 100000 -s
"""

from __future__ import annotations

import json
import operator
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hosfl_lightning.wire import (
    CodedGradient,
    Message,
    Multiplier,
    ProbedData,
    SmashedData,
    TooLargeError,
    WireError,
    decode,
    encode,
)
from tests.rng.conftest import MemoryMeter
from tests.wire.samples import every_form, frame, reseal, same

LIMIT = 1 << 20
FIELDS = {4: "<H", 6: "<B", 7: "<B", 8: "<I", 12: "<I", 32: "<Q"}
"""Offsets and forms of the envelope's numbers."""
EDGES = [0, 1, 2, 3, 7, 8, 9, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
MARK = "@"
TOKENS = [
    "0", "1", "-1", "7", "255", "4294967296", "9223372036854775808", "9" * 5000, "0.5", "-0.0", "NaN", "-Infinity",
    "1e999", "null", "true", "[]", "{}", '""', "[[1]]", "[2,2]", "[0,99999]", '"F64"', '"U8"', '"I8"', '"BOOL"',
    '"int8"', '"fp32"', '"bfloat16"', '"z.scale"', '"basis"', "[" * 2000, "[" * 800 + "]" * 800, '{"a":1,"a":2}',
]  # fmt: skip


def flip_bits(draw: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(draw.randint(1, 3)):
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8


def change_bytes(draw: random.Random, data: bytearray, other: bytes) -> None:
    for _ in range(draw.randint(1, 6)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def truncate(draw: random.Random, data: bytearray, other: bytes) -> None:
    del data[draw.randrange(len(data)) :]


def insert(draw: random.Random, data: bytearray, other: bytes) -> None:
    at = draw.randint(0, len(data))
    data[at:at] = draw.randbytes(draw.randint(1, 9))


def duplicate(draw: random.Random, data: bytearray, other: bytes) -> None:
    start = draw.randrange(len(data))
    part = data[start : start + draw.randint(1, 64)]
    at = draw.choice([start, draw.randint(0, len(data))])
    data[at:at] = part


def splice(draw: random.Random, data: bytearray, other: bytes) -> None:
    at = draw.randrange(len(data))
    data[at:] = other[draw.choice([min(at, len(other)), draw.randrange(len(other))]) :]


def edit_envelope(draw: random.Random, data: bytearray, other: bytes) -> None:
    offset, form = draw.choice(list(FIELDS.items()))
    struct.pack_into(form, data, offset, draw.choice(EDGES) % 256 ** struct.calcsize(form))


def edit_header_length(draw: random.Random, data: bytearray, other: bytes) -> None:
    length = int.from_bytes(data[72:80], "little")
    data[72:80] = draw.choice([*EDGES, length - 8, length - 1, length + 1, length + 8]).to_bytes(8, "little")


def edit_buffers(draw: random.Random, data: bytearray, other: bytes) -> None:
    """Bytes of which exponents of infinity and NaN are made, and zeros."""
    at = draw.randrange(80 + int.from_bytes(data[72:80], "little"), len(data) + 1)
    part = draw.choice([b"\xff", b"\x7f", b"\0"]) * draw.randint(1, 16)
    data[at : at + len(part)] = part[: len(data) - at]


def edit_json(draw: random.Random, data: bytearray, other: bytes) -> None:
    """One entry of the header or of the plain values is replaced, renamed or dropped; the frame is sound otherwise."""
    end = 80 + int.from_bytes(data[72:80], "little")
    header = json.loads(data[80:end])
    tree = draw.choice([header, json.loads(header["__metadata__"]["message"])])
    holder, key = draw.choice(list(entries(tree)))
    tokens = [*TOKENS, json.dumps(operator.getitem(*draw.choice(list(entries(tree)))))]
    if type(holder[key]) is int:
        tokens += 8 * [str(holder[key] + draw.choice([-1, 1]))]
    match draw.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(["round", "scale", "z.scale", "basis.a", "tensors.a", "a"])] = holder.pop(key)
        case _:
            holder[key] = MARK
    text = json.dumps(tree).replace(f'"{MARK}"', draw.choice(tokens))
    if tree is not header:
        header["__metadata__"]["message"] = text
        text = json.dumps(header)
    text += " " * (-len(text) % 8)
    data[72:end] = len(text).to_bytes(8, "little") + text.encode()
    data[32:40] = (len(data) - 72).to_bytes(8, "little")


def entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (dict, key) and (list, index) of a tree of JSON."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from entries(value)


MUTATIONS = [
    flip_bits, change_bytes, truncate, insert, duplicate, splice, edit_envelope, edit_header_length, edit_buffers,
    *4 * [edit_json],
]  # fmt: skip


def mended(draw: random.Random, data: bytes) -> bytes:
    """With a checksum that fits, and mostly a length that does."""
    if len(data) < 72:
        return data
    if draw.random() < 0.8:
        data = data[:32] + (len(data) - 72).to_bytes(8, "little") + data[40:]
    return reseal(data)


def use(message: Message) -> None:
    """What a receiver does with a message: none of it may fail."""
    assert same(decode(encode(message)), message)
    if isinstance(message, SmashedData):
        z, _, mask = message.unpack()
        assert z.isfinite().all()
        assert len(message.z.values) == int(mask.sum())
    elif isinstance(message, Multiplier):
        assert message.multiplier.restore().isfinite().all()
    elif isinstance(message, ProbedData):
        assert message.z.restore().isfinite().all()
    elif isinstance(message, CodedGradient):
        assert message.unpack().isfinite().all()
        assert message.unpack().shape == (message.count,)


def decoded(data: bytes) -> tuple[Message | WireError, int]:
    """The message or why it is refused, and the most memory that took beside the frame (Python's, buffers included)."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    result: Message | WireError
    try:
        result = decode(data, limit=LIMIT)
    except WireError as error:
        result = error
    return result, tracemalloc.get_traced_memory()[1] - before


def test_a_damaged_frame_is_the_message_or_is_refused(request: pytest.FixtureRequest) -> None:
    draw = random.Random(0)
    sent = [message for seed in (0, 2, 5) for message in every_form(seed)]
    frames = [encode(message, draw.randbytes(16)) for message in sent]
    outcomes: Counter[str] = Counter()
    peak = 0
    tracemalloc.start()
    with MemoryMeter() as meter:
        for trial in range(request.config.getoption("--fuzz")):
            mutant = bytearray(draw.choice(frames))
            draw.choice(MUTATIONS)(draw, mutant, draw.choice(frames))
            resealed = trial % 2 == 1
            data = mended(draw, bytes(mutant)) if resealed else bytes(mutant)
            result, taken = decoded(data)
            peak = max(peak, taken)
            name = type(result).__name__ if isinstance(result, WireError) else "decoded"
            outcomes[name + resealed * " (resealed)"] += 1
            if isinstance(result, WireError):
                continue
            if resealed:
                use(result)
            else:
                assert same(result, sent[frames.index(data)])
    tracemalloc.stop()
    print(*sorted(outcomes.items()), f"peak: {peak} bytes in Python, {meter.peak} in torch", sep="\n")
    assert peak + meter.peak < LIMIT
    assert outcomes["decoded"] < outcomes.total() / 40  # some damage changes nothing
    assert outcomes["ChecksumError"] > outcomes.total() / 10
    kinds = {name.removesuffix(" (resealed)") for name in outcomes} - {"decoded"}
    assert len(kinds) == 12, sorted(kinds)


@pytest.mark.parametrize(("masks", "numel"), [(1, LIMIT), (1, 8 * LIMIT - 2**16), (90, 80_000)])
def test_packed_bits_are_refused_before_they_are_unpacked(masks: int, numel: int) -> None:
    """A bit of the frame becomes a byte: eight times a frame that keeps to the limit."""
    names = [f"mask{i}" for i in range(masks)]
    packed = {name: torch.zeros(numel // 8, dtype=torch.uint8) for name in names}
    data = frame({"fields": {}, "bits": {name: [1, numel] for name in names}}, packed, kind=1)
    assert len(data) < LIMIT
    with MemoryMeter() as meter:
        result, _ = decoded(data)
    assert isinstance(result, TooLargeError)
    assert meter.peak < 2**10


def test_the_largest_mask_unpacks_within_the_limit() -> None:
    """What the server makes of it, and what decoding takes beside it."""
    numel = LIMIT // 13
    mask = torch.arange(numel)[None] % 8192 == 7
    message = SmashedData.pack(0, 0, torch.ones(1, numel, 1), torch.ones(1), mask)
    data = encode(message)
    with MemoryMeter() as meter:
        result, _ = decoded(data)
    assert same(result, message)
    assert meter.peak < 2 * numel
