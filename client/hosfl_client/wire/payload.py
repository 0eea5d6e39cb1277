"""Named tensors and plain values as one safetensors file in memory, and back: strictly, and nothing is executed.

    8 bytes, little-endian: N  |  N bytes: JSON header, padded with spaces to 8  |  the tensors' buffers

The buffers follow each other without a gap, widest dtype first. Plain values are one canonical JSON string (sorted
keys, no blanks) under ``__metadata__.message``; JSON writes a float by its shortest repr, which reads back to the same
bits. Format: https://github.com/huggingface/safetensors#format. Read here and not by safetensors itself, which takes
the last of two equal keys and copies the buffers twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from hosfl_client.wire.arrays import ITEMSIZE, Form
from hosfl_client.wire.errors import DtypeError, DuplicateKeyError, FieldError, FrameError, TooLargeError, WireError

_LENGTH_BYTES = 8
MAX_DIMS = 32
HEADER_SHARE = 32
"""The JSON header may be this part of the limit: as Python objects it grows about twentyfold."""


def layout(values: object, forms: Mapping[str, Form]) -> tuple[bytes, dict[str, int], int]:
    """The part before the buffers, where each buffer begins behind it, and the length of it all.

    Raises:
        FieldError: Values that JSON does not hold exactly.
    """
    entries: dict[str, Any] = {"__metadata__": {"message": _dumps(values)}}
    starts: dict[str, int] = {}
    end = 0
    for name, form in sorted(forms.items(), key=lambda item: (-item[1].itemsize, item[0])):
        starts[name], begin, end = end, end, end + form.bytes
        entries[name] = {"dtype": form.code, "shape": form.shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    return header, starts, len(header) + end


def parse(payload: memoryview, limit: int, view: Callable[[bytearray, int, Form], Any]) -> tuple[Any, dict[str, Any]]:
    """The values and the tensors, which ``view`` makes of one copy of the buffers.

    Raises:
        FrameError: Not what `layout` describes.
        DuplicateKeyError: A key occurs twice.
        DtypeError: A dtype that does not travel.
        TooLargeError: A header over its share of ``limit``, or a shape over ``limit``.
    """
    size = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    if size > limit // HEADER_SHARE:
        raise TooLargeError(f"a header of {size} bytes is over 1/{HEADER_SHARE} of the limit of {limit}")
    begin = _LENGTH_BYTES + size
    if len(payload) < begin:
        raise FrameError(f"a payload of {len(payload)} bytes cannot hold a header of {size}")
    header = _loads(bytes(payload[_LENGTH_BYTES:begin]))
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.keys() != {"message"} or not isinstance(metadata["message"], str):
        raise FrameError("the header must be a dict with the message's plain values under __metadata__.message")
    buffers = bytearray(payload[begin:])
    places = [_place(name, entry, limit) for name, entry in header.items()]
    tensors = {}
    end = 0
    for start, name, form in sorted(places, key=lambda place: (place[0], place[2].bytes)):
        # Offsets are not alignments: a buffer behind a narrower one could begin anywhere.
        if start != end or start % form.itemsize:
            raise FrameError(f"{name}: its buffer begins at {start}, expected it at {end} and aligned")
        end = start + form.bytes
        if end > len(buffers):
            break
        tensors[name] = view(buffers, start, form)
    if end != len(buffers):
        raise FrameError(f"the buffers take {end} bytes, there are {len(buffers)}")
    return _loads(metadata["message"]), tensors


def _place(name: str, entry: Any, limit: int) -> tuple[int, str, Form]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FrameError(f"{name:.80}: a buffer has a dtype, a shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in ITEMSIZE:
        raise DtypeError(f"{name:.80}: {code!r:.80} does not travel")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or not _are_sizes(offsets) or len(offsets) != 2:
        raise FrameError(f"{name:.80}: the shape and the two offsets must be integers >= 0")
    form = Form(code, shape)
    # An empty tensor costs no byte here, but what is made from it may.
    if math.prod(max(size, 1) for size in shape) * form.itemsize > limit:
        raise TooLargeError(f"{name:.80}: a tensor of shape {shape} is over the limit of {limit} bytes")
    if offsets[1] - offsets[0] != form.bytes:
        raise FrameError(f"{name:.80}: the offsets {offsets} do not fit {code} {shape}")
    return offsets[0], name, form


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _dumps(values: object) -> str:
    try:
        return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FieldError(f"a field cannot be written as JSON: {error}") from error


def _loads(text: bytes | str) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique)
    except WireError:
        raise
    except ValueError as error:
        raise FrameError(f"the payload's header is no JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(f"{key!r:.80} occurs twice")
        found[key] = value
    return found
