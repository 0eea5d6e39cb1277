"""What every message asks of its fields: each refusal names the kind and the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hosfl_client.wire.arrays import Arrays
from hosfl_client.wire.errors import DtypeError, FieldError, ShapeError

COUNTS = 1 << 63
"""Counts are below; a longer integer is a mistake or an attack."""
PROBES = STEPS = 1 << 12
"""Probes of a round, and local steps of a client in it, that the counter of a stream tells apart."""


def check_counts(kind: str, **counts: object) -> None:
    """Integers >= 0."""
    for name, value in counts.items():
        if type(value) is not int or not 0 <= value < COUNTS:
            raise FieldError(f"{kind}: {name} must be an integer >= 0, got {value!r:.80}")


def check_loss(kind: str, loss: object) -> None:
    """A float, or None."""
    if loss is not None and not isinstance(loss, float):
        raise FieldError(f"{kind}: loss must be a float or None, got {loss!r:.80}")


def check_strings(kind: str, **strings: object) -> None:
    """Strings."""
    for name, value in strings.items():
        if not isinstance(value, str):
            raise FieldError(f"{kind}: {name} must be a string, got {value!r:.80}")


def check_step(kind: str, step: int) -> None:
    """A local step that the counter of a stream holds, in the probe's place."""
    if not 0 <= step < STEPS:
        raise FieldError(f"{kind}: step must be in 0 .. {STEPS - 1}, got {step}; take fewer local steps in a round")


def check_probe(kind: str, probe: int, side: int) -> None:
    """One side of a probe that a round can have."""
    check_counts(kind, probe=probe, side=side)
    if probe >= PROBES:
        raise FieldError(f"{kind}: probe must be below {PROBES}, got {probe}")
    if side > 1:
        raise FieldError(f"{kind}: side must be 0 (θ + μu) or 1 (θ − μu), got {side}")


def check_tensor(arrays: Arrays, kind: str, name: str, value: Any, dim: int | None, codes: Sequence[str]) -> None:
    """A tensor with ``dim`` dimensions (None: any number) of one of the dtypes with these codes."""
    if not arrays.are(value):
        raise FieldError(f"{kind}: {name} must be a tensor, got {type(value).__name__}")
    code, shape = arrays.form(value)
    if code not in codes:
        raise DtypeError(f"{kind}: {name} must be {' or '.join(map(arrays.word, codes))}, got {arrays.word(code)}")
    if len(shape) != (len(shape) if dim is None else dim):
        raise ShapeError(f"{kind}: {name} must have {dim} dimensions, got {shape}")


def check_named_tensors(arrays: Arrays, kind: str, name: str, value: object, codes: Sequence[str]) -> None:
    """A dict from names to tensors of any shape in one of the dtypes with these codes."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FieldError(f"{kind}: {name} must be a dict from names to tensors")
    for key, tensor in value.items():
        check_tensor(arrays, kind, f"{name}.{key:.80}", tensor, None, codes)


def check_settings(kind: str, name: str, value: object) -> None:
    """A dict from strings to plain values: None, bool, int, float, string, or a list of these."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FieldError(f"{kind}: {name} must be a dict with string keys, got {value!r:.80}")
    for key, entry in value.items():
        if not all(_is_plain(item) for item in (entry if isinstance(entry, list | tuple) else [entry])):
            raise FieldError(f"{kind}: {name}.{key} must be a plain value or a list of them, got {entry!r:.80}")


def check_clients(kind: str, participants: object, weights: object) -> None:
    """Client numbers and as many weights 0 <= w <= 1."""
    if not isinstance(participants, list) or not isinstance(weights, list):
        raise FieldError(f"{kind}: participants and weights must be lists")
    for client in participants:
        check_counts(kind, participants=client)
    if not all(type(w) in (int, float) and 0 <= w <= 1 for w in weights):
        raise FieldError(f"{kind}: weights must be numbers between 0 and 1, got {weights!r:.80}")
    if len(participants) != len(weights):
        raise FieldError(f"{kind}: {len(participants)} participants, but {len(weights)} weights")


def _is_plain(value: object) -> bool:
    if type(value) is int:
        return abs(value) < COUNTS
    return value is None or isinstance(value, bool | str) or (isinstance(value, float) and math.isfinite(value))
