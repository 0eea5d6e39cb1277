"""Messages as bytes: an envelope and a payload, so that the size on the wire is known without writing it.

Round and client are in the envelope. Of the other fields, a tensor is a buffer under the field's name; a dict, or a
:class:`Coded`, is its tensors as buffers ``field.key`` and the rest of it as plain values; anything else is a plain
value. A bool tensor travels as packed bits, first element highest, with its shape among the plain values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from hosfl_lightning.wire.codecs import Coded
from hosfl_lightning.wire.envelope import ENVELOPE_BYTES, LIMIT, Envelope, check_address, peek, seal, verify
from hosfl_lightning.wire.errors import (
    AddressError,
    DuplicateKeyError,
    FieldError,
    FrameError,
    NonFiniteError,
    ShapeError,
    TooLargeError,
)
from hosfl_lightning.wire.messages import MESSAGES, CodedGradient, Message, Multiplier, ProbedData, SmashedData
from hosfl_lightning.wire.payload import MAX_DIMS, Form, layout, parse

_IN_ENVELOPE = {"round", "client"}
_LEAST_UNPACKED = torch.bool.itemsize + torch.int64.itemsize + torch.float32.itemsize
"""Bytes of a position of a mask, once unpacked: itself, its label and one column of z."""
_HINTS = {kind: get_type_hints(cls) for kind, cls in MESSAGES.items()}


def encode(message: Message, run_id: bytes = bytes(16)) -> bytes:
    """Writes a message as one frame; tensors may be on any device.

    Args:
        message: What is sent.
        run_id: 16 bytes that every message of a run carries.

    Raises:
        FieldError: A field has a wrong type, shape or dtype, or a value that does not travel exactly.
    """
    message.check()
    values, tensors = _take_apart(message)
    header, starts, _ = _lay_out(message, values, tensors)
    parts = [header, *(_buffer(tensors[name]) for name in starts)]
    return seal(parts, message.kind, message.round, getattr(message, "client", None), run_id)


def encoded_size(message: Message) -> int:
    """``len(encode(message))`` in bytes from shapes and dtypes alone: no copy of a tensor, no wait for a device.

    Raises:
        FieldError: A field that cannot be written.
    """
    values, tensors = _take_apart(message)
    return ENVELOPE_BYTES + _lay_out(message, values, tensors)[2]


def decode(
    data: bytes,
    kind: str | None = None,
    *,
    run_id: bytes | None = None,
    round: int | None = None,
    client: int | None = None,
    limit: int = LIMIT,
) -> Message:
    """Reads a message; its tensors are new ones on the CPU.

    Args:
        data: What :func:`encode` returned at the other end.
        kind: The kind that is expected here; None takes any.
        run_id: The run that is expected; None takes any.
        round: The round that is expected; None takes any.
        client: The client that is expected; None takes any.
        limit: Most bytes of the frame, and of what its message unpacks to.

    Raises:
        WireError: The bytes are not a message for here: one of its kinds (see ``errors``), cheap checks first.
    """
    envelope = peek(data, limit)
    verify(data)
    check_address(envelope, kind, run_id, round, client)
    try:
        return _read(envelope, memoryview(data)[ENVELOPE_BYTES:], limit)
    except RecursionError:
        raise FrameError("the payload's values are nested too deeply") from None


def _read(envelope: Envelope, payload: memoryview, limit: int) -> Message:
    plain, tensors = parse(payload, limit)
    if not isinstance(plain, dict) or plain.keys() != {"fields", "bits"} or not all(map(_is_dict, plain.values())):
        raise FrameError("the plain values of a message must be a dict of fields and a dict of bits")
    message = _put_together(envelope, plain["fields"], _unpack_all_bits(tensors, plain["bits"], limit))
    check_finite(message)
    message.check()
    if isinstance(message, SmashedData | Multiplier | ProbedData | CodedGradient) and message.unpacked_bytes() > limit:
        raise TooLargeError(f"{message.kind}: it would unpack to more than the limit of {limit} bytes")
    return message


def check_finite(message: Message) -> None:
    """Refuses NaN and infinity, as :func:`decode` does; for a message that is handed over and not encoded.

    Raises:
        NonFiniteError: Names the field.
    """
    values, tensors = _take_apart(message)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist())):  # one wait for a device
            bad = int((~tensor.isfinite()).sum())
            raise NonFiniteError(f"{message.kind}: {name} has {bad} values that are NaN or infinite")
    for name in _not_finite(values):
        raise NonFiniteError(f"{message.kind}: {name} has a number that is NaN or infinite")


def _lay_out(message: Message, values: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """`layout`; what JSON has no word for is refused by name."""
    for name in _not_finite(values):
        raise FieldError(f"{message.kind}: {name} has a number that is NaN or infinite")
    return layout(values, _forms(tensors))


def _not_finite(values: dict[str, Any]) -> Iterator[str]:
    """The plain fields that hold NaN or infinity."""
    for name, value in values["fields"].items():
        if not all(map(math.isfinite, _floats(value))):
            yield name


def _take_apart(message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain values and, by the names of their buffers, the tensors of a message."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for field in fields(message):
        value = getattr(message, field.name)
        value = vars(value) if isinstance(value, Coded) else value
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif isinstance(value, dict):
            tensors |= {f"{field.name}.{key}": part for key, part in value.items() if isinstance(part, Tensor)}
            plain[field.name] = {key: part for key, part in value.items() if not isinstance(part, Tensor)}
        elif field.name not in _IN_ENVELOPE:
            plain[field.name] = value
    bits = {name: [*tensor.shape] for name, tensor in tensors.items() if tensor.dtype == torch.bool}
    return {"fields": plain, "bits": bits}, tensors


def _put_together(envelope: Envelope, plain: dict[str, Any], tensors: dict[str, Tensor]) -> Message:
    """The reverse of `_take_apart`."""
    cls = MESSAGES[envelope.kind]
    hints = _HINTS[cls.kind]
    values: dict[str, Any] = {"round": envelope.round, **plain}
    if not isinstance(envelope.client, hints.get("client", type(None))):
        raise AddressError(f"{cls.kind}: it is {'from or to one client' if 'client' in hints else 'for everybody'}")
    if "client" in hints:
        values["client"] = envelope.client
    if plain.keys() & _IN_ENVELOPE:
        raise DuplicateKeyError(f"{cls.kind}: round and client are in the envelope already")
    for name, tensor in tensors.items():
        field, dot, key = name.partition(".")
        holder, key = (values.get(field), key) if dot else (values, field)
        if not isinstance(holder, dict):
            raise FieldError(f"{cls.kind}: unexpected tensor {name:.80}")
        if key in holder:
            raise DuplicateKeyError(f"{cls.kind}: {name:.80} occurs twice")
        holder[key] = tensor
    for name in [name for name, hint in hints.items() if hint is Coded and name in values]:
        values[name] = _build(Coded, values[name], f"{cls.kind}.{name}")
    return _build(cls, values, cls.kind)


def _build(cls: type[Any], values: Any, what: str) -> Any:
    expected = {field.name for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() != expected:
        differing = sorted(values.keys() ^ expected) if isinstance(values, dict) else sorted(expected)
        raise FieldError(f"{what}: missing or unexpected fields: {', '.join(differing):.200}")
    return cls(**values)


def _forms(tensors: dict[str, Tensor]) -> dict[str, Form]:
    return {
        name: Form(torch.uint8, [-(-t.numel() // 8)]) if t.dtype == torch.bool else Form(t.dtype, [*t.shape])
        for name, t in tensors.items()
    }


def _unpack_all_bits(tensors: dict[str, Tensor], bits: dict[str, Any], limit: int) -> dict[str, Tensor]:
    if not bits.keys() <= tensors.keys():
        raise FieldError(f"bits without a buffer: {', '.join(bits.keys() - tensors.keys()):.80}")
    numel = sum(_check_bits(name, tensors[name], shape) for name, shape in bits.items())
    if numel * _LEAST_UNPACKED > limit:
        raise TooLargeError(f"packed bits: {numel} elements would unpack to more than the limit of {limit} bytes")
    return tensors | {name: _unpack_bits(tensors[name], shape) for name, shape in bits.items()}


def _buffer(tensor: Tensor) -> Any:
    """The bytes of a tensor as they travel, shared with it where they can be."""
    tensor = _pack_bits(tensor) if tensor.dtype == torch.bool else tensor.detach().reshape(-1)
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data


def _pack_bits(mask: Tensor) -> Tensor:
    """np.packbits of the flattened mask: eight elements a byte, the first one in the highest bit."""
    octets = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (octets << shifts).sum(1, dtype=torch.uint8)


def _check_bits(name: str, packed: Tensor, shape: Any) -> int:
    """The number of elements."""
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= MAX_DIMS
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise ShapeError(f"{name:.80}: the shape of packed bits must be a list of sizes > 0, got {shape!r:.80}")
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != -(-numel // 8):
        raise ShapeError(f"{name:.80}: {packed.dtype} {[*packed.shape]} does not hold the bits of {shape!s:.80}")
    return numel


def _unpack_bits(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))  # without a temporary, which torch would take
    return torch.from_numpy(bits).view(torch.bool).view(shape)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _floats(value: object) -> Iterable[float]:
    """All floats in nested lists and dicts; not recursive, since the nesting comes from outside."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, float):
            yield value
        elif isinstance(value, dict | list | tuple):
            left += value.values() if isinstance(value, dict) else value
