"""The fixed part of a frame: what it is, whose it is, how long, and a checksum. Little-endian, 72 bytes.

    magic 4 | protocol u16 | kind u8 | 0 u8 | round u32 | client u32 | run id 16 | payload length u64 | SHA-256 32

The SHA-256 is over the other 40 bytes and the payload that follows. Client 0 is everybody, else client id + 1. The
checksum finds what a wire or a disk did to a frame; it does not tell who wrote it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from hosfl_client.wire.errors import (
    AddressError,
    ChecksumError,
    FieldError,
    FrameError,
    KindError,
    TooLargeError,
    TruncatedError,
    VersionError,
)
from hosfl_client.wire.kinds import KINDS

PROTOCOL = 2
"""Version of the frames that this code reads and writes."""

LIMIT = 1 << 30
"""Most bytes of a frame, and of what its message unpacks to, unless the receiver says otherwise."""

MAGIC = b"HOSF"
RUN_ID_BYTES = 16
_FIXED = struct.Struct("<4sHBBII16sQ")
_DIGEST_BYTES = hashlib.sha256().digest_size
ENVELOPE_BYTES = _FIXED.size + _DIGEST_BYTES
_CODES = {kind: code for code, kind in enumerate(KINDS, start=1)}
_KINDS = {code: kind for kind, code in _CODES.items()}


class Envelope(NamedTuple):
    """What a frame says of itself."""

    kind: str
    round: int
    client: int | None
    run_id: bytes
    length: int
    """Bytes of the payload."""


def peek(data: bytes, limit: int = LIMIT) -> Envelope:
    """Reads the fixed part alone: whose message this claims to be. The checksum is :func:`verify`'s.

    Raises:
        TooLargeError: The frame is longer than ``limit`` bytes, or says so.
        FrameError: The bytes do not begin like a frame, or go on after its end.
        TruncatedError: The bytes end before the frame does.
        VersionError: Another version of the protocol.
        KindError: An unknown kind of message.
    """
    if len(data) > limit:
        raise TooLargeError(f"a frame of {len(data)} bytes is over the limit of {limit}")
    if data[:4] != MAGIC[: len(data)]:
        raise FrameError(f"a frame begins with {MAGIC!r}, these {len(data)} bytes with {bytes(data[:4])!r}")
    if len(data) < ENVELOPE_BYTES:
        raise TruncatedError(f"{len(data)} bytes are less than a frame's first {ENVELOPE_BYTES}")
    _, version, code, reserved, round, client, run_id, length = _FIXED.unpack_from(data)
    if version != PROTOCOL:
        raise VersionError(f"the frame is of protocol version {version}, this side speaks {PROTOCOL}")
    if length > limit - ENVELOPE_BYTES:
        raise TooLargeError(f"the frame announces {length} bytes, over the limit of {limit}")
    missing = ENVELOPE_BYTES + length - len(data)
    if missing > 0:
        raise TruncatedError(f"the frame's last {missing} of {length} bytes are missing")
    if missing < 0 or reserved:
        raise FrameError(f"{-missing} bytes follow the frame" if missing else f"the reserved byte is {reserved}, not 0")
    if code not in _KINDS:
        raise KindError(f"unknown kind of message: {code}")
    return Envelope(_KINDS[code], round, client - 1 if client else None, run_id, length)


def checksum(data: bytes) -> bytes:
    """The SHA-256 that a frame carries. Of frames that are verified: equal ones are equal in every byte."""
    return bytes(data[_FIXED.size : ENVELOPE_BYTES])


def verify(data: bytes) -> None:
    """Recomputes the checksum of a whole frame.

    Raises:
        ChecksumError: It is another one.
    """
    view = memoryview(data)
    if _digest([view[: _FIXED.size], view[ENVELOPE_BYTES:]]) != checksum(data):
        raise ChecksumError("the frame's SHA-256 does not match: it was changed on the way")


def check_address(
    envelope: Envelope, kind: str | None, run_id: bytes | None, round: int | None, client: int | None
) -> None:
    """Compares with what is expected here; None takes any.

    Raises:
        KindError: Another kind.
        AddressError: Another run, round or client.
    """
    if kind not in (None, envelope.kind):
        raise KindError(f"expected a message of kind {kind}, got {envelope.kind}")
    for name, expected in (("run_id", run_id), ("round", round), ("client", client)):
        got = getattr(envelope, name)
        if expected not in (None, got):
            raise AddressError(f"{envelope.kind}: expected {name} {expected!r}, got {got!r}")


def seal(parts: Sequence[Any], kind: str, round: int, client: int | None, run_id: bytes) -> bytes:
    """A frame: the fixed part, and behind it the payload, which comes in parts, contiguous buffers; one copy is made.

    Raises:
        FieldError: A value that the fixed part cannot hold.
    """
    if len(run_id) != RUN_ID_BYTES:
        raise FieldError(f"run_id must have {RUN_ID_BYTES} bytes, got {len(run_id)}")
    addressee = 0 if client is None else client + 1
    length = sum(memoryview(part).nbytes for part in parts)
    try:
        fixed = _FIXED.pack(MAGIC, PROTOCOL, _CODES[kind], 0, round, addressee, run_id, length)
    except struct.error:
        raise FieldError(f"{kind}: round {round} or client {client} does not fit in 32 bits") from None
    return b"".join([fixed, _digest([fixed, *parts]), *parts])


def _digest(parts: Sequence[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()
