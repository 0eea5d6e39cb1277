from __future__ import annotations

import json
import math
import random
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from hosfl_lightning.wire import (
    MESSAGES,
    FieldError,
    FrameError,
    KindError,
    Message,
    Multiplier,
    ProjectedGradients,
    SmashedData,
    Update,
    WireError,
    decode,
    encode,
    encoded_size,
)

BASIS: dict[str, int | float | str] = {"kind": "shared_directions", "probes": 2, "distribution": "rademacher"}
RULE: dict[str, Any] = {"name": "adamw", "lr": 1e-3 / 3, "betas": [0.9, 0.999], "eps": 5e-324, "nesterov": False}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _bits(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Uniform bit patterns: every NaN payload, infinity, subnormal and signed zero is a value that has to survive."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def _smashed(seed: int, dtype: torch.dtype = torch.float32, per_token: bool = True) -> SmashedData:
    draw = random.Random(seed)
    batch, length, hidden = draw.randint(1, 5), draw.randint(1, 37), draw.randint(1, 9)
    lengths = torch.tensor([draw.randint(0, length) for _ in range(batch)])
    mask = torch.arange(length) < lengths[:, None]
    labels = torch.full((batch, length) if per_token else (batch,), draw.choice([-100, 0, 31999, 2**31 - 1]))
    z = _bits(seed, batch, length, hidden, dtype=dtype)
    return SmashedData.pack(10 ** draw.randint(0, 6), draw.randint(0, 99), z, labels, mask)


def _messages(seed: int, dtype: torch.dtype = torch.float32) -> list[Message]:
    smashed = _smashed(seed, dtype, per_token=seed % 2 == 0)
    coefficients = _bits(seed, seed % 17, dtype=torch.float32)
    return [
        smashed,
        Multiplier(smashed.round, smashed.client, smashed.z),
        ProjectedGradients(smashed.round, 4, BASIS | {"µ": 1 / 3, "note": 'a "b" \\ \n é'}, coefficients, 10**seed),
        Update(smashed.round, BASIS, coefficients, RULE, seed, list(range(seed)), [1 / (k + 3) for k in range(seed)]),
    ]


def _assert_same(left: Message, right: Message) -> None:
    assert type(left) is type(right)
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), field.name
        else:
            assert a == b
            assert repr(a) == repr(b) or isinstance(a, dict), field.name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_round_trip_is_bit_for_bit_and_the_size_is_known_before(dtype: torch.dtype) -> None:
    for seed in range(60):
        for message in _messages(seed, dtype):
            data = encode(message)
            assert encoded_size(message) == len(data)
            _assert_same(message, decode(data))
            _assert_same(message, decode(data, message.kind))


def test_a_frame_is_what_safetensors_itself_writes(tmp_path: Path) -> None:
    for message in _messages(3, torch.bfloat16):
        data = encode(message)
        (tmp_path / "frame").write_bytes(data)
        with safe_open(tmp_path / "frame", framework="pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["message"])["kind"] == message.kind
        assert save(load(data), metadata) == data


def test_dtypes_on_the_wire() -> None:
    message = _smashed(1, torch.bfloat16)
    tensors = load(encode(message))
    assert {name: t.dtype for name, t in tensors.items()} == {
        "z": torch.bfloat16,
        "labels": torch.int32,
        "mask": torch.uint8,
    }
    flat = message.mask.reshape(-1).tolist()
    assert len(tensors["mask"]) == -(-len(flat) // 8)
    for index, valid in enumerate(flat):
        assert bool(tensors["mask"][index // 8] & (128 >> index % 8)) is valid


def test_padding_does_not_travel() -> None:
    z, labels = torch.ones(2, 8, 100), torch.ones(2, 8, dtype=torch.int64)
    sizes = {}
    for padding in (0, 8, 800):
        message = SmashedData.pack(
            0,
            0,
            torch.nn.functional.pad(z, (0, 0, padding, 0), value=9.0),
            torch.nn.functional.pad(labels, (padding, 0), value=5),
            torch.nn.functional.pad(torch.ones(2, 8, dtype=torch.bool), (padding, 0)),
        )
        multiplier = Multiplier.pack(0, 0, torch.ones(2, 8 + padding, 100), message.mask)
        sizes[padding] = encoded_size(message), encoded_size(multiplier)
    assert sizes[0][1] == sizes[8][1] == sizes[800][1]
    header_slack = 24
    assert 0 <= sizes[8][0] - sizes[0][0] <= 2 * 8 // 8 + header_slack
    assert 2 * 800 // 8 <= sizes[800][0] - sizes[0][0] <= 2 * 800 // 8 + header_slack


def test_size_reads_no_tensor_data() -> None:
    real = _smashed(5)
    meta = replace(real, z=real.z.to("meta"), labels=real.labels.to("meta"), mask=real.mask.to("meta"))
    assert encoded_size(meta) == len(encode(real))


def test_equal_messages_are_equal_bytes() -> None:
    message = ProjectedGradients(0, 0, {"kind": "shared_directions", "probes": 2}, torch.ones(2), 1)
    assert encode(message) == encode(replace(message, basis={"probes": 2, "kind": "shared_directions"}))


def test_tensors_with_strides_or_a_graph_travel_as_their_values() -> None:
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    received = decode(encode(Multiplier(0, 0, z.t())))
    assert isinstance(received, Multiplier)
    assert torch.equal(received.multiplier, z.detach().t())
    assert not received.multiplier.requires_grad


def test_mutated_frames_decode_or_raise_a_wire_error() -> None:
    draw = random.Random(0)
    frames = [encode(message) for seed in (2, 5) for message in _messages(seed)]
    refused = 0
    for trial in range(2000):
        original = draw.choice(frames)
        data = bytearray(original)
        header = 8 + int.from_bytes(data[:8], "little")
        match trial % 4:
            case 0:
                del data[draw.randrange(len(data)) :]
            case 1:
                data[draw.randrange(header)] ^= 1 << draw.randrange(8)
            case 2:
                for _ in range(draw.randint(2, 6)):
                    data[draw.randrange(header)] = draw.randrange(256)
            case _:
                data += draw.randbytes(draw.randint(1, 9))
        try:
            message = decode(bytes(data))
        except WireError:
            refused += 1
        else:
            _assert_same(message, decode(encode(message)))
    assert refused > 1500


@pytest.mark.parametrize("claimed", [2**64 - 1, 2**40, 99_000_000, 64])
def test_a_huge_header_length_is_refused_without_allocating(claimed: int) -> None:
    tracemalloc.start()
    with pytest.raises(FrameError, match="safetensors"):
        decode(claimed.to_bytes(8, "little") + b'{"a":1}')
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def _frame(envelope: object, tensors: dict[str, Tensor] | None = None) -> bytes:
    text = envelope if isinstance(envelope, str) else json.dumps(envelope)
    return save({"coefficients": torch.ones(2)} if tensors is None else tensors, {"message": text})


GRADIENTS = {"round": 1, "client": 2, "basis": {}, "num_terms": 3}
SMASHED = {"round": 1, "client": 2, "labels_per_token": False}
TENSORS = {"z": torch.ones(3, 2), "labels": torch.ones(1, dtype=torch.int32), "mask": torch.tensor([0b11100000]).byte()}


def _raw_frame(dtype: str, shape: list[int], nbytes: int) -> bytes:
    """A frame that safetensors' own writer cannot be made to write."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    header = json.dumps({"__metadata__": {"message": json.dumps(_gradients())}, "coefficients": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(nbytes)


def _gradients(**changes: object) -> dict[str, object]:
    return {"kind": "projected_gradients", "fields": GRADIENTS | changes, "bits": {}}


def _smashed_frame(bits: object = None, **tensors: Tensor) -> bytes:
    envelope = {"kind": "smashed_data", "fields": SMASHED, "bits": {"mask": [1, 8]} if bits is None else bits}
    return _frame(envelope, TENSORS | tensors)


def test_the_hand_made_frames_below_are_sound_but_for_their_fault() -> None:
    assert isinstance(decode(_frame(_gradients())), ProjectedGradients)
    assert isinstance(decode(_smashed_frame()), SmashedData)
    assert isinstance(decode(_raw_frame("F32", [2], 8)), ProjectedGradients)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"", FrameError, "safetensors"),
        (b"\x80\x04pickle", FrameError, "safetensors"),
        (save({"coefficients": torch.ones(2)}), FrameError, "header"),
        (save({"coefficients": torch.ones(2)}, {"other": "1"}), FrameError, "header"),
        (_frame("[" * 100_000), FrameError, "header"),
        (_frame('{"kind":"update","fields":{"round":' + "9" * 5000 + '},"bits":{}}'), FrameError, "header"),
        (_frame("[]"), FrameError, "header"),
        (_frame({"kind": [], "fields": {}, "bits": {}}), FrameError, "header"),
        (_frame({"kind": "update", "fields": [], "bits": {}}), FrameError, "header"),
        (_frame(json.dumps(_gradients(basis={"mu": 1.0})).replace("1.0", "NaN")), FrameError, "NaN"),
        (_frame(json.dumps(_gradients(basis={"mu": 1.0})).replace("1.0", "1e999")), FrameError, "finite"),
        (_frame({"kind": "gradient", "fields": {}, "bits": {}}), KindError, "'gradient'"),
        (_frame(_gradients(), {}), FieldError, "coefficients"),
        (_frame(_gradients(), {"coefficients": torch.ones(2), "extra": torch.ones(1)}), FieldError, "extra"),
        (_frame(_gradients(secret=1)), FieldError, "secret"),
        (_frame(_gradients(round=-1)), FieldError, "round"),
        (_frame(_gradients(client=True)), FieldError, "client"),
        (_frame(_gradients(num_terms=1.5)), FieldError, "num_terms"),
        (_frame(_gradients(basis=[])), FieldError, "basis"),
        (_frame(_gradients(), {"coefficients": torch.ones(2).double()}), FieldError, "coefficients"),
        (_frame(_gradients(), {"coefficients": torch.ones(2, 1)}), FieldError, "coefficients"),
        (_frame(_gradients(coefficients=1), {}), FieldError, "coefficients"),
        (_raw_frame("F4", [2], 1), FrameError, "F4"),
        (_raw_frame("F32", [0, 2**63], 0), FrameError, "safetensors"),
        (_raw_frame("F32", [2**62, 2**62], 4), FrameError, "safetensors"),
        (_raw_frame("F32", [2, 0, 2], 0), FieldError, "coefficients"),
        (_smashed_frame(z=torch.ones(2, 2)), FieldError, "z has 2 rows"),
        (_smashed_frame(z=torch.ones(3, 2).int()), FieldError, "z must"),
        (_smashed_frame(labels=torch.ones(2, dtype=torch.int32)), FieldError, "1 labels"),
        (_smashed_frame(mask=torch.ones(2).byte()), FieldError, "mask"),
        (_smashed_frame(labels=torch.ones(1, dtype=torch.int64)), FieldError, "int64 does not travel"),
        (_smashed_frame(bits={}), FieldError, "mask"),
        (_smashed_frame(bits={}, mask=TENSORS["mask"].bool()[:, None]), FieldError, "bool does not travel"),
        (_smashed_frame(bits={"mask": [2**40, 2**40]}), FieldError, "mask"),
        (_smashed_frame(bits={"mask": [-1, -8]}), FieldError, "mask"),
        (_smashed_frame(bits={"mask": "18"}), FieldError, "mask"),
        (_smashed_frame(bits={"mask": [0, 2**70]}, mask=torch.ones(0).byte()), FieldError, "mask"),
    ],
)
def test_malformed_messages_are_refused(data: bytes, error: type[WireError], match: str) -> None:
    with pytest.raises(error, match=match):
        decode(data)


def test_another_kind_than_expected_is_refused() -> None:
    data = encode(_messages(1)[1])
    for kind in MESSAGES:
        if kind != "multiplier":
            with pytest.raises(KindError, match="multiplier"):
                decode(data, kind)


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficients": torch.ones(2, dtype=torch.float64)},
        {"basis": {"mu": float("nan")}},
        {"basis": {"mu": float("inf")}},
        {"basis": {"mu": torch.ones(1)}},
        {"basis": {1: 2}},
        {"round": torch.tensor(1)},
        {"num_terms": -1},
    ],
)
def test_what_does_not_travel_exactly_is_refused_when_sent(changes: dict[str, Any]) -> None:
    message = replace(ProjectedGradients(0, 0, BASIS, torch.ones(2), 1), **changes)
    with pytest.raises(FieldError):
        encode(message)


def test_update_and_smashed_data_are_checked_when_sent() -> None:
    update: Any = Update(0, BASIS, torch.ones(1), RULE, 0, [1, 2], [0.5])
    with pytest.raises(FieldError, match="2 participants"):
        encode(update)
    with pytest.raises(FieldError, match="participants"):
        encode(replace(update, weights=[0.5, 0.5], participants=[1, "2"]))
    with pytest.raises(FieldError, match="weights"):
        encode(replace(update, weights=(0.5, 0.5)))
    smashed: Any = _smashed(5)
    with pytest.raises(FieldError, match="rows"):
        encode(replace(smashed, z=smashed.z[:-1]))
    with pytest.raises(FieldError, match="labels_per_token"):
        encode(replace(smashed, labels_per_token=1))
    with pytest.raises(FieldError, match="32 bits"):
        encode(replace(smashed, labels=smashed.labels + 2**31))
