"""What an object was made with, as plain values that a checkpoint can hold and a later run can compare."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FrameType
from typing import Any

#: A longer sequence is no setting but content.
LONGEST = 64


def given(instance: Any, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of the constructors that are running on an object; of one name, those nearest to ``frame``.

    Args:
        instance: What is being made.
        frame: Of its base's ``__init__``, which those of its subclasses have called.
    """
    found: dict[str, Any] = {}
    while frame is not None and frame.f_code.co_name == "__init__":
        names, _, keywords, held = inspect.getargvalues(frame)
        if not names or held[names[0]] is not instance:
            break
        found = {name: held[name] for name in names[1:]} | (held[keywords] if keywords else {}) | found
        frame = frame.f_back
    return found


def plain(value: Any) -> Any:
    """A value as JSON would give it back: dataclasses and objects by class and fields, functions by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__qualname__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(one) for one in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
        return items if len(items) <= LONGEST else f"{len(items)} values"
    if isinstance(value, partial):
        return {"function": plain(value.func), "args": plain(value.args), **plain(value.keywords)}
    return getattr(value, "__qualname__", type(value).__qualname__)
