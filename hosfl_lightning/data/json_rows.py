"""JSON lines, and JSON documents that hold a list of objects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from hosfl_lightning.data.rows import Row


def json_lines(source: str, name: str) -> Iterator[Row]:
    """One object a line; blank lines are skipped.

    Raises:
        ValueError: A line is no JSON object, or no text can be made of it.
    """
    for number, line in enumerate(io.StringIO(source, newline=None), start=1):
        where = f"{name} line {number}"
        if line.strip():
            yield _row(_loads(line, where, numbered=True), where, _has_halves(line))


def json_document(source: str, name: str) -> Iterator[Row]:
    """A list of objects, an object with one key that holds such a list, or JSON lines under another name.

    Raises:
        ValueError: It is none of these.
    """
    try:
        whole = _loads(source, name, numbered=False)
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data":  # a second object
            return json_lines(source, name)
        raise
    if isinstance(whole, dict) and len(whole) == 1 and isinstance(next(iter(whole.values())), list):
        whole = next(iter(whole.values()))
    if not isinstance(whole, list):
        by_column = isinstance(whole, dict) and any(isinstance(value, dict | list) for value in whole.values())
        pandas = '; pandas writes it with to_json(path, orient="records")' if by_column else ""
        raise ValueError(
            f"{name}: must hold a list of JSON objects, an object with one key and such a list, or an object a line"
            f"{pandas}"
        )
    halves = _has_halves(source)
    return (_row(fields, f"{name} record {number}", halves) for number, fields in enumerate(whole))


def _loads(text: str, where: str, numbered: bool) -> Any:
    """The value; `numbered`: the place names the line already."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (nested too deeply)") from error
    except json.JSONDecodeError as error:
        place = where if numbered else f"{where} line {error.lineno}"
        raise ValueError(
            f"{place}: not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
        ) from error
    except ValueError as error:  # a number of more digits than Python takes
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _row(fields: Any, where: str, halves: bool) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be a JSON object with named fields, not {json.dumps(fields)[:40]}")
    for name, value in fields.items() if halves else ():
        if not _is_text(name) or not _is_text(value):
            shown = name.encode(errors="replace").decode()
            raise ValueError(f"{where}: field {shown!r} holds half of a surrogate pair, which is no text")
    return Row(where, fields)


def _has_halves(source: str) -> bool:
    """Whether there are escapes of half a surrogate pair, each of which may lack its other half."""
    return "\\ud" in source or "\\uD" in source


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
