"""What a user can mend, as one line on standard error, with the nearest name for one that is mistyped."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import NoReturn

#: Where classes are that a recipe names.
ROOMS = ("algorithms", "models", "data", "optim", "aggregation", "callbacks", "availability", "networks", "loggers")
#: What jsonargparse says of every value that is no class path, beside the reason.
NOISE = re.compile(r"Expected a path but|a (class path|dict) (\(str\)|with)|Not a valid subclass")


def process() -> int:
    """Which of the processes of a run this is; the first is 0."""
    module = sys.modules.get("lightning.fabric.utilities.rank_zero")  # whoever has no Lightning is alone
    return getattr(getattr(module, "rank_zero_only", None), "rank", None) or 0


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    where = f" in process {process()}" if process() else ""
    line = readable(message)
    print(f"hosfl: error{where}: {line}", file=sys.stderr)
    raise SystemExit(2) from ValueError(line)


def readable(message: str) -> str:
    """The line of a parser's report that says what is wrong.

    For an optional setting jsonargparse lists why the value is neither the type nor None, level by level, and dumps the
    value; the reason is the one entry that speaks of neither.
    """
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    reasons: list[str] = []
    for line in lines:
        if line.startswith("- "):
            reasons.append(line.removeprefix("- "))
        elif reasons and reasons[-1].endswith(":"):  # "Problem with given class_path": what it was stands below
            reasons[-1] += f" {line}"
    plain = [r for r in reasons if "NoneType" not in r and not r.startswith("Does not validate")]
    reasons = [r for r in plain if not NOISE.match(r)] or plain
    if not reasons:
        return with_hint(" ".join(lines))
    key = re.match(r'Parser key "([^"]+)":', lines[0])
    given = next((line for line in lines if line.startswith("Given value: ") and "Namespace" not in line), "")
    if any(given.removeprefix("Given value: ") in reason or "class_path" in given for reason in reasons):
        given = ""
    said = " ".join(filter(None, [f"{key[1]}:" if key else "", "; ".join(dict.fromkeys(reasons)), given]))
    return with_hint(said)


def listed(names: Iterable[str], by: str = ", ") -> str:
    """``a, b``; a name that itself holds a comma or semicolon stands in quotes."""
    return by.join(f"'{name}'" if {*name} & {*",;"} else name for name in names)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean max_rounds?``, of one or two that are about as near, or nothing where none is."""
    near = get_close_matches(name, {*known} - {name}, n=2, cutoff=0.7)
    ratios = [SequenceMatcher(None, one, name).ratio() for one in near]
    near = [one for one, ratio in zip(near, ratios) if ratio > ratios[0] - 0.03]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def with_hint(line: str) -> str:
    """The line, and the nearest to a name in it that is none: of a class, of a choice."""
    if "did you mean" in line:
        return line
    if found := re.search(r"invalid choice: '(.+?)' \(choose from (.+?)\)", line):
        return line + nearest(found[1], re.findall(r"[\w-]+", found[2]))
    if found := re.search(r"Expected a typing.Literal\[(.+?)\]", line):
        names = [name.strip().strip("'") for name in found[1].split(",")]
        given = re.search(r"Given value: (\S+)", line)
        line = line.replace(found[0], f"must be one of {', '.join(names)}")
        return line + (nearest(given[1], names) if given else "")
    if found := re.search(r"[Ee]xpected a dot import path string: (\S+)", line):
        return line + nearest(found[1], _classes())
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", line):
        return line + nearest(f"{found[1]}.{found[2]}", (f"{found[1]}.{name}" for name in _inside(found[1])))
    return line


def _inside(module: str) -> set[str]:
    """Classes, functions and modules of a module."""
    loaded = import_module(module)
    named = {name for name, one in vars(loaded).items() if not name.startswith("_") and callable(one)}
    return named | {one.name for one in iter_modules(getattr(loaded, "__path__", []))}


def _classes() -> set[str]:
    """Names that a recipe may give without their modules."""
    return {name for room in ROOMS for name in _inside(f"{__package__}.{room}") if name[0].isupper()}
