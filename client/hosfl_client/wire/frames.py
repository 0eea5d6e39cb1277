"""Messages as bytes: an envelope and a payload, so that the size on the wire is known without writing it.

Round and client are in the envelope. Of the other fields, a tensor is a buffer under the field's name; a dict, or a
coded tensor, is its tensors as buffers ``field.key`` and the rest of it as plain values; anything else is a plain
value. A bool tensor travels as packed bits, first element highest, with its shape among the plain values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_type_hints

from hosfl_client.wire.arrays import ITEMSIZE, Arrays, Form
from hosfl_client.wire.envelope import ENVELOPE_BYTES, LIMIT, Envelope, check_address, peek, seal, verify
from hosfl_client.wire.errors import (
    AddressError,
    DtypeError,
    DuplicateKeyError,
    FieldError,
    FrameError,
    KindError,
    NonFiniteError,
    ShapeError,
    TooLargeError,
)
from hosfl_client.wire.payload import MAX_DIMS, layout, parse

_IN_ENVELOPE = {"round", "client"}
_LEAST_UNPACKED = 1 + 8 + 4
"""Bytes of a position of a mask, once unpacked: itself, its int64 label and one column of z in fp32."""


class Framed(Protocol):
    """A message: a dataclass, whose fields travel."""

    kind: ClassVar[str]

    @property
    def round(self) -> int:
        """Round number."""

    def check(self, arrays: Arrays) -> None:
        """Raises FieldError unless types, dtypes and shapes are what they must be."""


M = TypeVar("M", bound=Framed)


class Frames(Generic[M]):
    """The messages of an engine as bytes, and back.

    Args:
        arrays: The engine.
        messages: By kind, those that this side knows. A field that is annotated with a dataclass holds a coded tensor;
            a message that takes more memory than its frame says so in ``unpacked_bytes``.
    """

    def __init__(self, arrays: Arrays, messages: Mapping[str, type[M]]) -> None:
        self.arrays = arrays
        self.messages = messages
        self._hints = {kind: get_type_hints(cls) for kind, cls in messages.items()}
        self._coded: dict[str, dict[str, type[Any]]] = {
            kind: {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
            for kind, hints in self._hints.items()
        }

    def encode(self, message: M, run_id: bytes = bytes(16)) -> bytes:
        """Writes a message as one frame; tensors may be on any device.

        Args:
            message: What is sent.
            run_id: 16 bytes that every message of a run carries.

        Raises:
            FieldError: A field has a wrong type, shape or dtype, or a value that does not travel exactly.
        """
        message.check(self.arrays)
        values, tensors = self._take_apart(message)
        header, starts, _ = self._lay_out(message, values, tensors)
        parts = [header, *(self._buffer(tensors[name]) for name in starts)]
        return seal(parts, message.kind, message.round, getattr(message, "client", None), run_id)

    def encoded_size(self, message: M) -> int:
        """``len(encode(message))`` in bytes from shapes and dtypes alone: no copy of a tensor, no wait for a device.

        Raises:
            FieldError: A field that cannot be written.
        """
        values, tensors = self._take_apart(message)
        return ENVELOPE_BYTES + self._lay_out(message, values, tensors)[2]

    def decode(
        self,
        data: bytes,
        kind: str | None = None,
        *,
        run_id: bytes | None = None,
        round: int | None = None,
        client: int | None = None,
        limit: int = LIMIT,
    ) -> M:
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
        if envelope.kind not in self.messages:
            raise KindError(f"{envelope.kind}: this side knows no such message")
        try:
            return self._read(envelope, memoryview(data)[ENVELOPE_BYTES:], limit)
        except RecursionError:
            raise FrameError("the payload's values are nested too deeply") from None

    def check_finite(self, message: M) -> None:
        """Refuses NaN and infinity, as :func:`decode` does; for a message that is handed over and not encoded.

        Raises:
            NonFiniteError: Names the field.
        """
        values, tensors = self._take_apart(message)
        for name, tensor in tensors.items():
            if bad := self.arrays.not_finite(tensor):
                raise NonFiniteError(f"{message.kind}: {name} has {bad} values that are NaN or infinite")
        for name in _not_finite(values):
            raise NonFiniteError(f"{message.kind}: {name} has a number that is NaN or infinite")

    def _read(self, envelope: Envelope, payload: memoryview, limit: int) -> M:
        plain, tensors = parse(payload, limit, self.arrays.view)
        if not isinstance(plain, dict) or plain.keys() != {"fields", "bits"} or not all(map(_is_dict, plain.values())):
            raise FrameError("the plain values of a message must be a dict of fields and a dict of bits")
        unpacked = self._unpack_all_bits(tensors, plain["bits"], limit)
        message = self._put_together(envelope, plain["fields"], unpacked)
        self.check_finite(message)
        message.check(self.arrays)
        unpacked_bytes = getattr(message, "unpacked_bytes", None)
        if unpacked_bytes is not None and unpacked_bytes() > limit:
            raise TooLargeError(f"{message.kind}: it would unpack to more than the limit of {limit} bytes")
        return message

    def _lay_out(
        self, message: M, values: dict[str, Any], tensors: dict[str, Any]
    ) -> tuple[bytes, dict[str, int], int]:
        """`layout`; what JSON has no word for is refused by name."""
        for name in _not_finite(values):
            raise FieldError(f"{message.kind}: {name} has a number that is NaN or infinite")
        return layout(values, {name: self._form(name, tensor) for name, tensor in tensors.items()})

    def _form(self, name: str, tensor: Any) -> Form:
        """As it travels."""
        form = self.arrays.form(tensor)
        if form.code == "BOOL":
            return Form("U8", [-(-math.prod(form.shape) // 8)])
        if form.code not in ITEMSIZE:
            raise DtypeError(f"{name}: {self.arrays.word(form.code)} does not travel")
        return form

    def _buffer(self, tensor: Any) -> memoryview:
        is_mask = self.arrays.form(tensor).code == "BOOL"
        return self.arrays.buffer(self.arrays.pack_bits(tensor) if is_mask else tensor)

    def _take_apart(self, message: M) -> tuple[dict[str, Any], dict[str, Any]]:
        """The plain values and, by the names of their buffers, the tensors of a message."""
        plain: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        coded, are = self._coded[message.kind], self.arrays.are
        for name in [field.name for field in fields(message)]:  # type: ignore[arg-type]
            value = getattr(message, name)
            value = vars(value) if isinstance(value, coded.get(name, ())) else value
            if are(value):
                tensors[name] = value
            elif isinstance(value, dict):
                tensors.update({f"{name}.{key}": part for key, part in value.items() if are(part)})
                plain[name] = {key: part for key, part in value.items() if not are(part)}
            elif name not in _IN_ENVELOPE:
                plain[name] = value
        forms = {name: self.arrays.form(tensor) for name, tensor in tensors.items()}
        return {"fields": plain, "bits": {n: form.shape for n, form in forms.items() if form.code == "BOOL"}}, tensors

    def _put_together(self, envelope: Envelope, plain: dict[str, Any], tensors: dict[str, Any]) -> M:
        """The reverse of `_take_apart`."""
        kind = envelope.kind
        hints = self._hints[kind]
        values: dict[str, Any] = {"round": envelope.round, **plain}
        if not isinstance(envelope.client, hints.get("client", type(None))):
            raise AddressError(f"{kind}: it is {'from or to one client' if 'client' in hints else 'for everybody'}")
        if "client" in hints:
            values["client"] = envelope.client
        if plain.keys() & _IN_ENVELOPE:
            raise DuplicateKeyError(f"{kind}: round and client are in the envelope already")
        for name, tensor in tensors.items():
            field, dot, key = name.partition(".")
            holder, key = (values.get(field), key) if dot else (values, field)
            if not isinstance(holder, dict):
                raise FieldError(f"{kind}: unexpected tensor {name:.80}")
            if key in holder:
                raise DuplicateKeyError(f"{kind}: {name:.80} occurs twice")
            holder[key] = tensor
        for name, cls in self._coded[kind].items():
            if name in values:
                values[name] = _build(cls, values[name], f"{kind}.{name}")
        return _build(self.messages[kind], values, kind)

    def _unpack_all_bits(self, tensors: dict[str, Any], bits: dict[str, Any], limit: int) -> dict[str, Any]:
        if not bits.keys() <= tensors.keys():
            raise FieldError(f"bits without a buffer: {', '.join(bits.keys() - tensors.keys()):.80}")
        numel = sum(self._check_bits(name, tensors[name], shape) for name, shape in bits.items())
        if numel * _LEAST_UNPACKED > limit:
            raise TooLargeError(f"packed bits: {numel} elements would unpack to more than the limit of {limit} bytes")
        return tensors | {name: self.arrays.unpack_bits(tensors[name], shape) for name, shape in bits.items()}

    def _check_bits(self, name: str, packed: Any, shape: Any) -> int:
        """The number of elements."""
        if (
            not isinstance(shape, list)
            or not 0 < len(shape) <= MAX_DIMS
            or not all(type(n) is int and n > 0 for n in shape)
        ):
            raise ShapeError(f"{name:.80}: the shape of packed bits must be a list of sizes > 0, got {shape!r:.80}")
        numel = math.prod(shape)
        code, sizes = self.arrays.form(packed)
        if code != "U8" or sizes != [-(-numel // 8)]:
            word = self.arrays.word(code)
            raise ShapeError(f"{name:.80}: {word} {sizes} does not hold the bits of {shape!s:.80}")
        return numel


def _not_finite(values: dict[str, Any]) -> Iterator[str]:
    """The plain fields that hold NaN or infinity."""
    for name, value in values["fields"].items():
        if not all(map(math.isfinite, _floats(value))):
            yield name


def _build(cls: type[Any], values: Any, what: str) -> Any:
    expected = {field.name for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() != expected:
        differing = sorted(values.keys() ^ expected) if isinstance(values, dict) else sorted(expected)
        raise FieldError(f"{what}: missing or unexpected fields: {', '.join(differing):.200}")
    return cls(**values)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _floats(value: object) -> Iterable[float]:
    """All floats in nested lists and dicts; not recursive, since the nesting comes from outside."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, float):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            left += value.values() if isinstance(value, dict) else value
