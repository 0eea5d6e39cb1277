"""The files of a command line: what is in them, and where a key stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from hosfl_lightning.rendering import nearest

#: The keys of a recipe.
RECIPE = ("seed_everything", "trainer", "model", "data")


def read_files(args: list[str]) -> dict[str, Any]:
    """The contents of the YAML files that a command line names, by their paths.

    Raises:
        ValueError: A file is no YAML, or has a key beside those of a recipe.
    """
    pairs = zip(args, [*args[1:], ""])
    given = [arg.partition("=")[2] or after for arg, after in pairs if arg.partition("=")[0] in ("--config", "-c")]
    found = {}
    for name in given:
        if not Path(name).is_file():
            continue
        try:
            found[name] = get_loader("yaml")(Path(name).read_text())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            raise ValueError(f"--config: {name} is no YAML: {where}{error.problem}") from error
    return found


def located(line: str, files: dict[str, Any]) -> str:
    """The line, and where the key stands that it says is not known."""
    found = re.search(r"(?:does not accept option|Option) '(.+?)'", line)
    if found is None:
        return line
    key = found[1]
    for file, content in files.items():
        path = next((one for one in paths(content) if one == key or one.endswith(f".{key}")), None)
        if path is not None:
            top = path.partition(".")[0]
            hint = "" if top in RECIPE or "did you mean" in line else nearest(top, RECIPE)
            return f"{file}: {path}: {line}{hint}"
    return line


def paths(content: Any, above: str = "") -> Iterator[str]:
    """Of all keys, each behind those above it, with dots between."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield f"{above}{key}"
            yield from paths(value, f"{above}{key}.")


def leaves(content: Any, above: str = "") -> Iterator[str]:
    """Of `paths`, those with a value that is no group of settings."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
