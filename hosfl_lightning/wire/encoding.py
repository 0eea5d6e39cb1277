"""Messages as bytes: one safetensors frame each, so that the size on the wire is known without writing it.

    8 bytes, little-endian: N  |  N bytes: JSON header, padded with spaces to 8  |  the tensors' buffers

Every tensor field is a buffer under its name; all other fields are one canonical JSON string (sorted keys, no blanks)
under ``__metadata__.message``. JSON writes a float by its shortest repr, which reads back to the same bits. A dtype in
memory travels as

    floating   as it is, bit for bit
    int64      int32
    bool       packed bits, first element highest; the shape is in the JSON string

Format: https://github.com/huggingface/safetensors#format. Nothing here can execute what it reads.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from hosfl_lightning.wire.errors import FieldError, FrameError, KindError
from hosfl_lightning.wire.messages import MESSAGES, Message

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint8: "U8",
}


class _Buffer(NamedTuple):
    """Where a tensor lies in the frame; ``start`` counts from the end of the header."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


def encode(message: Message) -> bytes:
    """Writes a message as one safetensors frame; tensors may be on any device.

    Raises:
        FieldError: A field has a wrong type, shape or dtype, or a value that does not travel exactly: NaN or infinity
            in a dict, a label beyond 32 bits.
    """
    message.check()
    header, buffers = _layout(message)
    frame = bytearray(len(header) + max(buffer.stop for buffer in buffers.values()))
    frame[: len(header)] = header
    for name, buffer in buffers.items():
        if buffer.stop > buffer.start:
            tensor = _to_wire(message, name, getattr(message, name))
            start = len(header) + buffer.start
            torch.frombuffer(frame, dtype=buffer.dtype, count=tensor.numel(), offset=start).copy_(tensor.reshape(-1))
    return bytes(frame)


def encoded_size(message: Message) -> int:
    """``len(encode(message))`` in bytes from shapes and dtypes alone: no copy of a tensor, no wait for a device.

    Raises:
        FieldError: A field that cannot be written.
    """
    header, buffers = _layout(message)
    return len(header) + max(buffer.stop for buffer in buffers.values())


def decode(data: bytes, kind: str | None = None) -> Message:
    """Reads a message; its tensors are new ones on the CPU.

    Args:
        data: What :func:`encode` returned at the other end.
        kind: The kind that is expected here; None takes any.

    Raises:
        FrameError: The bytes are not one whole frame.
        KindError: The message is of another or an unknown kind.
        FieldError: A field is missing, unexpected, or of the wrong type, shape or dtype.
    """
    tensors = _load(data)
    envelope = _envelope(data)
    cls = MESSAGES.get(envelope["kind"])
    if cls is None or kind not in (None, cls.kind):
        raise KindError(f"expected a message of kind {kind or ' | '.join(MESSAGES)}, got {envelope['kind']!r}")
    values = envelope["fields"] | {name: _from_wire(name, t, envelope["bits"]) for name, t in tensors.items()}
    expected = {field.name for field in fields(cls)}
    if values.keys() != expected:
        raise FieldError(f"{cls.kind}: missing or unexpected fields: {', '.join(sorted(values.keys() ^ expected))}")
    message = cls(**values)
    message.check()
    return message


def _layout(message: Message) -> tuple[bytes, dict[str, _Buffer]]:
    """The frame's first part (length and header) and the place of every buffer, widest dtype first for alignment."""
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    envelope = {
        "kind": message.kind,
        "fields": {name: value for name, value in values.items() if name not in tensors},
        "bits": {name: [*value.shape] for name, value in tensors.items() if value.dtype == torch.bool},
    }
    buffers = _place(tensors)
    entries: dict[str, Any] = {"__metadata__": {"message": _dumps(message.kind, envelope)}}
    for name, buffer in buffers.items():
        offsets = [buffer.start, buffer.stop]
        entries[name] = {"dtype": _CODES[buffer.dtype], "shape": buffer.shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, buffers


def _place(tensors: dict[str, Tensor]) -> dict[str, _Buffer]:
    forms = {name: _wire_form(name, tensor) for name, tensor in tensors.items()}
    buffers: dict[str, _Buffer] = {}
    start = 0
    for name, (dtype, shape) in sorted(forms.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        stop = start + math.prod(shape) * dtype.itemsize
        buffers[name] = _Buffer(dtype, shape, start, stop)
        start = stop
    return buffers


def _wire_form(name: str, tensor: Tensor) -> tuple[torch.dtype, list[int]]:
    if tensor.dtype == torch.bool:
        return torch.uint8, [-(-tensor.numel() // 8)]
    dtype = torch.int32 if tensor.dtype == torch.int64 else tensor.dtype
    if dtype not in _CODES:
        raise FieldError(f"{name}: {tensor.dtype} does not travel")
    return dtype, [*tensor.shape]


def _to_wire(message: Message, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bool:
        return _pack_bits(tensor)
    if tensor.dtype == torch.int64:
        limits = torch.iinfo(torch.int32)
        if tensor.min() < limits.min or tensor.max() > limits.max:
            raise FieldError(f"{message.kind}: {name} has values beyond 32 bits")
        return tensor.to(torch.int32)
    return tensor


def _from_wire(name: str, tensor: Tensor, bits: dict[str, Any]) -> Tensor:
    if name in bits:
        return _unpack_bits(name, tensor, bits[name])
    if tensor.dtype not in _CODES:
        raise FieldError(f"{name}: {tensor.dtype} does not travel")
    return tensor.to(torch.int64) if tensor.dtype == torch.int32 else tensor


def _pack_bits(mask: Tensor) -> Tensor:
    """np.packbits of the flattened mask: eight elements a byte, the first one in the highest bit."""
    octets = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (octets << shifts).sum(1, dtype=torch.uint8)


def _unpack_bits(name: str, packed: Tensor, shape: Any) -> Tensor:
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise FieldError(f"{name}: the shape of packed bits must be a list of sizes > 0, got {shape!r}")
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != -(-numel // 8):
        raise FieldError(f"{name}: {packed.dtype} {[*packed.shape]} does not hold the bits of {shape}")
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (packed[:, None] >> shifts & 1).reshape(-1)[:numel].reshape(shape).bool()


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FrameError(f"not a safetensors frame of {len(data)} bytes: {error}") from error


def _envelope(data: bytes) -> dict[str, Any]:
    """The JSON string of a frame whose header safetensors has found sound."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")].decode())
        envelope = json.loads(header["__metadata__"]["message"], parse_constant=_refuse, parse_float=_finite)
        sound = isinstance(envelope["kind"], str) and all(isinstance(envelope[key], dict) for key in ("fields", "bits"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FrameError(f"the frame has no readable message header: {error!r}") from error
    if not sound:
        raise FrameError("the frame's message header must hold a kind, fields and bits")
    return envelope


def _dumps(kind: str, envelope: dict[str, Any]) -> str:
    try:
        return json.dumps(envelope, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FieldError(f"{kind}: a field cannot be written as JSON: {error}") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is not finite")
    return value
