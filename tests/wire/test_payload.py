from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from hosfl_lightning.wire import (
    DtypeError,
    DuplicateKeyError,
    FieldError,
    FrameError,
    NonFiniteError,
    ProbedData,
    ProjectedGradients,
    ShapeError,
    SmashedData,
    Snapshot,
    TooLargeError,
    Weights,
    WireError,
    decode,
)
from tests.rng.conftest import MemoryMeter
from tests.wire.samples import frame, same, seal

GRADIENTS = {"basis": {}, "num_terms": 3, "attempt": 0, "loss": None, "num_examples": 0}
CODED = {"codec": "fp32", "dtype": "float32", "width": 2, "scale": None}
TENSORS = {
    "z.values": torch.ones(3, 2),
    "labels": torch.ones(1, dtype=torch.int32),
    "mask": torch.tensor([0b11100000]).byte(),
}


def _gradients(**changes: object) -> dict[str, Any]:
    return {"fields": GRADIENTS | changes, "bits": {}}


def _text(old: str, new: str, **changes: object) -> str:
    """The gradients' plain values as JSON, with a part replaced."""
    text = json.dumps(_gradients(**changes))
    assert old in text
    return text.replace(old, new)


def _smashed(bits: object = None, z: object = CODED, tensors: dict[str, Tensor] | None = None, **changes: Any) -> bytes:
    fields = {"labels_per_token": False, "z": z, "attempt": 0, "step": 0} | changes
    plain = {"fields": fields, "bits": {"mask": [1, 8]} if bits is None else bits}
    return frame(plain, TENSORS | (tensors or {}), kind=1)


def _snapshot(tensors: object, buffers: dict[str, Tensor]) -> bytes:
    fields = {"version": 1, "incarnation": "", "reason": "", "step": 1, "tensors": tensors}
    return frame({"fields": fields, "bits": {}}, buffers, kind=6)


def _weights(tensors: object, buffers: dict[str, Tensor], **changes: object) -> bytes:
    fields = {"num_terms": 1, "tensors": tensors, "attempt": 0, "rule": {}, "loss": None, "num_examples": 0} | changes
    return frame({"fields": fields, "bits": {}}, buffers, kind=7)


def _probed(buffers: dict[str, Tensor] | None = None, **changes: object) -> bytes:
    fields = {"probe": 1, "side": 0, "z": CODED, "attempt": 0} | changes
    return frame({"fields": fields, "bits": {}}, {"z.values": torch.ones(3, 2)} | (buffers or {}), kind=8)


def _entry(dtype: object, shape: object, start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _raw(buffers: int, header: str | None = None, **entries: object) -> bytes:
    """A payload that safetensors' own writer cannot be made to write."""
    if header is None:
        header = json.dumps({"__metadata__": {"message": json.dumps(_gradients())}} | entries)
    return seal(len(header.encode()).to_bytes(8, "little") + header.encode() + bytes(buffers))


F32 = _entry("F32", [2], 0, 8)
SOUND = json.dumps({"__metadata__": {"message": json.dumps(_gradients())}, "coefficients": F32})


def test_the_hand_made_frames_below_are_sound_but_for_their_fault() -> None:
    expected = ProjectedGradients(1, 2, {}, torch.ones(2), 3)
    assert same(decode(frame(_gradients())), expected)
    assert same(decode(_raw(8, coefficients=F32)), decode(_raw(8, SOUND)))
    assert isinstance(decode(_smashed()), SmashedData)
    tensors = {"a.b": torch.ones(2), "c": torch.tensor(1.0)}
    message = decode(_snapshot({}, {f"tensors.{name}": tensor for name, tensor in tensors.items()}))
    assert isinstance(message, Snapshot)
    assert same(message.tensors, tensors)
    message = decode(_weights({}, {f"tensors.{name}": tensor for name, tensor in tensors.items()}))
    assert same(message, Weights(1, 2, tensors, 1))
    assert isinstance(decode(_probed()), ProbedData)


MALFORMED: list[tuple[bytes, type[WireError], str]] = [
    (seal(b""), FrameError, "cannot hold"),
    (seal(b"\x02\0\0\0\0\0\0\0[]"), FrameError, "must be a dict"),
    (seal(b"\x02\0\0\0\0\0\0\0\xff\xff"), FrameError, "JSON"),
    (seal(save({"coefficients": torch.ones(2)})), FrameError, "__metadata__"),
    (seal(save({"coefficients": torch.ones(2)}, {"other": "1"})), FrameError, "__metadata__"),
    (seal(save({"coefficients": torch.ones(2)}, {"message": "{}", "other": "1"})), FrameError, "__metadata__"),
    (_raw(8, SOUND.replace('"{', "{").replace('}"', "}").replace("\\", "")), FrameError, "__metadata__"),
    (frame("[" * 100_000), FrameError, "nested"),
    (frame(_text('"basis": {}', '"basis": ' + "[" * 900 + "]" * 900)), WireError, "basis|nested"),
    (frame(_text("3", "9" * 5000)), FrameError, "JSON"),
    (frame("[]"), FrameError, "dict of fields"),
    (frame({"fields": {}}), FrameError, "dict of fields"),
    (frame({"fields": [], "bits": {}}), FrameError, "dict of fields"),
    (frame({"fields": {}, "bits": {}, "more": {}}), FrameError, "dict of fields"),
    (frame(_text("1.0", "NaN", basis={"mu": 1.0})), NonFiniteError, "basis"),
    (frame(_text("1.0", "-Infinity", basis={"mu": 1.0})), NonFiniteError, "basis"),
    (frame(_text("1.0", "1e999", basis={"mu": 1.0})), NonFiniteError, "basis"),
    (frame(_text("1.0", "NaN", basis={"mu": [[1.0]]})), NonFiniteError, "basis"),
    (
        frame(_gradients(), {"coefficients": torch.tensor([1.0, float("nan")])}),
        NonFiniteError,
        "coefficients has 1",
    ),
    (frame(_text('"num_terms": 3', '"num_terms": 3, "num_terms": 4')), DuplicateKeyError, "'num_terms'"),
    (frame(_text('"bits": {}', '"bits": {}, "bits": {}')), DuplicateKeyError, "'bits'"),
    (_raw(8, SOUND.replace('"__metadata__"', '"coefficients": 1, "__metadata__"')), DuplicateKeyError, "'coeff"),
    (_raw(8, SOUND.replace('"shape"', '"dtype": "F32", "shape"')), DuplicateKeyError, "'dtype'"),
    (frame(_gradients(coefficients=1)), DuplicateKeyError, "coefficients"),
    (frame(_gradients(round=1)), DuplicateKeyError, "envelope"),
    (frame(_gradients(client=2)), DuplicateKeyError, "envelope"),
    (frame(_gradients(), {}), FieldError, "coefficients"),
    (frame(_gradients(coefficients=1), {}), FieldError, "coefficients must be a tensor"),
    (frame(_gradients(), {"coefficients": torch.ones(2), "extra": torch.ones(1)}), FieldError, "extra"),
    (frame(_gradients(), {"coefficients": torch.ones(2), "a.b": torch.ones(1)}), FieldError, "tensor a.b"),
    (frame(_gradients(), {"coefficients": torch.ones(2), "basis.b": torch.ones(1)}), FieldError, "basis.b"),
    (frame(_gradients(secret=1)), FieldError, "secret"),
    (frame(_gradients(num_terms=1.5)), FieldError, "num_terms"),
    (frame(_gradients(num_terms=10**4000)), FieldError, "num_terms"),
    (frame(_gradients(attempt=-1)), FieldError, "attempt"),
    (frame(_gradients(num_examples=None)), FieldError, "num_examples"),
    (frame(_gradients(loss=1)), FieldError, "loss"),
    (frame(_text('"loss": null', '"loss": NaN')), NonFiniteError, "loss"),
    (frame(_gradients(basis=[])), FieldError, "basis"),
    (frame(_gradients(basis={"a": {"b": 1}})), FieldError, "basis.a"),
    (frame(_gradients(), {"coefficients": torch.ones(2).double()}), DtypeError, "coefficients"),
    (frame(_gradients(), {"coefficients": torch.ones(2, 1)}), ShapeError, "coefficients"),
    (frame(_gradients(), {"coefficients": torch.ones(2).long()}), DtypeError, "'I64' does not travel"),
    (_raw(1, coefficients=_entry("F4", [2], 0, 1)), DtypeError, "'F4' does not travel"),
    (_raw(1, coefficients=_entry(["F32"], [2], 0, 1)), DtypeError, "does not travel"),
    (_raw(8, coefficients=7), FrameError, "a buffer has"),
    (_raw(8, coefficients=F32 | {"more": 1}), FrameError, "a buffer has"),
    (_raw(8, coefficients=_entry("F32", 2, 0, 8)), FrameError, "integers"),
    (_raw(8, coefficients=_entry("F32", [True, 2], 0, 8)), FrameError, "integers"),
    (_raw(8, coefficients=_entry("F32", [-1, -2], 0, 8)), FrameError, "integers"),
    (_raw(8, coefficients=_entry("F32", [1] * 33, 0, 4)), FrameError, "integers"),
    (_raw(8, coefficients=F32 | {"data_offsets": [0]}), FrameError, "integers"),
    (_raw(8, coefficients=_entry("F32", [2], 0, 4)), FrameError, "do not fit"),
    (_raw(8, coefficients=_entry("F32", [2], 8, 0)), FrameError, "do not fit"),
    (_raw(9, coefficients=F32), FrameError, "take 8 bytes, there are 9"),
    (_raw(7, coefficients=F32), FrameError, "take 8 bytes, there are 7"),
    (_raw(16, coefficients=_entry("F32", [2], 8, 16)), FrameError, "begins at 8, expected it at 0"),
    (_raw(8, coefficients=F32, again=F32), FrameError, "again: its buffer begins at 0, expected it at 8"),
    (_raw(9, a=_entry("U8", [1], 0, 1), coefficients=_entry("F32", [2], 1, 9)), FrameError, "aligned"),
    (_raw(0, coefficients=_entry("F32", [0, 2**62], 0, 0)), TooLargeError, "over the limit"),
    (_raw(0, coefficients=_entry("F32", [0, 2**63], 0, 0)), FrameError, "integers"),
    (_raw(4, coefficients=_entry("F32", [2**62, 2**62], 0, 4)), TooLargeError, "over the limit"),
    (_raw(0, coefficients=_entry("F32", [2, 0, 2], 0, 0)), ShapeError, "coefficients"),
    (_smashed(tensors={"z.values": torch.ones(2, 2)}), ShapeError, "z has 2 rows"),
    (_smashed(tensors={"z.values": torch.ones(3, 2).int()}), DtypeError, "z.values must"),
    (_smashed(tensors={"z.more": torch.ones(1)}), FieldError, "smashed_data.z: missing or unexpected fields: more"),
    (
        _smashed(z={"codec": "fp32"}),
        FieldError,
        "smashed_data.z: missing or unexpected fields: dtype, scale, width",
    ),
    (_smashed(z=3), FieldError, "unexpected tensor z.values"),
    (_smashed(z=CODED | {"values": 1}), DuplicateKeyError, "z.values"),
    (_smashed(z=CODED | {"width": 3}), ShapeError, "3 > 0 columns"),
    (_smashed(z=CODED | {"dtype": ["float32"]}), FieldError, "z.dtype"),
    (_smashed(tensors={"labels": torch.ones(2, dtype=torch.int32)}), ShapeError, "1 labels"),
    (_smashed(tensors={"labels": torch.ones(1, dtype=torch.uint8)}), DtypeError, "labels"),
    (_smashed(tensors={"mask": torch.ones(2).byte()}), ShapeError, "mask"),
    (_smashed(attempt=-1), FieldError, "attempt"),
    (_smashed(step=0.0), FieldError, "step"),
    (_smashed(bits={}), DtypeError, "mask"),
    (_smashed(bits={"mask": [1, 8], "labels": [1]}), ShapeError, "labels"),
    (_smashed(bits={"mask": [1, 8], "more": [1]}), FieldError, "bits without a buffer: more"),
    (_smashed(bits={}, tensors={"mask": torch.ones(1, 3).bool()}), DtypeError, "'BOOL' does not travel"),
    (_smashed(bits={"mask": [2**40, 2**40]}), ShapeError, "mask"),
    (_smashed(bits={"mask": [-1, -8]}), ShapeError, "mask"),
    (_smashed(bits={"mask": [1] * 40 + [8]}), ShapeError, "mask"),
    (_smashed(bits={"mask": "18"}), ShapeError, "mask"),
    (_smashed(bits={"mask": [0, 2**70]}, tensors={"mask": torch.ones(0).byte()}), ShapeError, "mask"),
    (_snapshot([], {"tensors.a": torch.ones(1)}), FieldError, "tensors.a"),
    (_snapshot({"a": 1}, {}), FieldError, "tensors.a"),
    (_snapshot({"a": 1}, {"tensors.a": torch.ones(1)}), DuplicateKeyError, "tensors.a"),
    (_snapshot({}, {"tensors.a": torch.ones(1).byte()}), DtypeError, "tensors.a"),
    (_weights([], {"tensors.a": torch.ones(1)}), FieldError, "tensors.a"),
    (_weights({"a": 1}, {}), FieldError, "tensors.a"),
    (_weights({"a": 1}, {"tensors.a": torch.ones(1)}), DuplicateKeyError, "tensors.a"),
    (_weights({}, {"tensors.a": torch.ones(1).double()}), DtypeError, "tensors.a"),
    (_weights({}, {"tensors.a": torch.tensor(float("nan"))}), NonFiniteError, "tensors.a has 1"),
    (_weights({}, {}, client=2), DuplicateKeyError, "envelope"),
    (_weights({}, {}, num_terms=-1), FieldError, "num_terms"),
    (_weights({}, {}, attempt=True), FieldError, "attempt"),
    (_weights({}, {}, num_examples=-1), FieldError, "num_examples"),
    (_weights({}, {}, loss="1"), FieldError, "loss"),
    (_weights({}, {}, rule=[]), FieldError, "rule"),
    (_weights({}, {"rule.lr": torch.ones(1)}), FieldError, "rule.lr"),
    (_weights({}, {}, extra=1), FieldError, "extra"),
    (_probed(probe=-1), FieldError, "probe"),
    (_probed(probe=4096), FieldError, "probe must be below"),
    (_probed(side=2), FieldError, "side must be 0"),
    (_probed(attempt=None), FieldError, "attempt"),
    (_probed(z=3), FieldError, "unexpected tensor z.values"),
    (_probed({"z.values": torch.full((3, 2), float("inf"))}), NonFiniteError, "z.values has 6"),
    (_probed({"z.values": torch.ones(3, 3)}), ShapeError, "2 > 0 columns"),
    (_probed({"mask": torch.ones(1).byte()}), FieldError, "mask"),
]


@pytest.mark.parametrize(("data", "error", "match"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_payloads_are_refused(data: bytes, error: type[WireError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        decode(data)
    assert error is WireError or type(caught.value) is error
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


LIMIT = 1 << 20
HOSTILE = {
    "header length": seal((2**64 - 1).to_bytes(8, "little") + b'{"a":1}'),
    "header length within the limit": seal((LIMIT // 32).to_bytes(8, "little") + b'{"a":1}'),
    "header of many objects": frame("[" + "[]," * (LIMIT // 4) + "[]]"),
    "shape": _raw(4, coefficients=_entry("F32", [2**30, 2**30], 0, 4)),
    "offsets": _raw(4, coefficients=_entry("F32", [LIMIT // 8], 0, LIMIT // 2)),
    "empty tensor": _raw(0, coefficients=_entry("F32", [0, LIMIT // 2], 0, 0)),
    "mask": _smashed(bits={"mask": [4, LIMIT]}, tensors={"mask": torch.zeros(LIMIT // 2).byte()}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_sizes_are_refused_without_allocating(data: bytes) -> None:
    tracemalloc.start()
    with MemoryMeter() as meter, pytest.raises(WireError):
        decode(data, limit=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + meter.peak < LIMIT
