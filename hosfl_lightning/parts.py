"""Parts of somebody's own: a class by its path, by its name in a message, and what its settings are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any


class PartError(ValueError):
    """A part that somebody has written does not keep its contract; one line names the class and the contract."""


def from_path(path: str, setting: str) -> Any:
    """``package.module.Class``, imported, and made without arguments.

    Raises:
        PartError: There is no such class, or it needs arguments.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise PartError(
            f"{setting}: {path} cannot be made ({error}); give the path of a class that is on PYTHONPATH, with "
            "class_path and init_args where it has settings"
        ) from error


def by_name(kind: type, what: str, settings: Mapping[str, Any]) -> Any:
    """The part whose class has the name ``settings["name"]``, of the settings beside it, as a message tells of it.

    Nothing is imported because a message says so: the class is of this package, or was imported before.

    Raises:
        PartError: No class or two of that name, or settings that it does not take.
    """
    name = settings.get("name")
    known: dict[tuple[str, str], Any] = {(one.__module__, one.__qualname__): one for one in _subclasses(kind)}
    found = [one for one in known.values() if one.__name__ == name]
    if not found:
        names = sorted({one.__name__ for one in known.values()})
        raise PartError(
            f"no {what} {name!r:.80} is known here, only {', '.join(names)}; import its class (hosfl join: --imports)"
        )
    if len(found) > 1:
        places = " and ".join(sorted(one.__module__ for one in found))
        raise PartError(f"{what} {name}: there are classes of that name in {places}; rename one")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "name"}
    try:
        return found[0](**given)
    except TypeError as error:
        raise PartError(f"{what} {name}: {error}") from error


def check_part(part: Any, kind: type, setting: str) -> None:
    """Refuse what is no ``kind``, and settings that are no fields of a dataclass, which nobody else could be told.

    Raises:
        PartError: It is not.
    """
    contract = f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}"
    if not isinstance(part, kind):
        given = part.__name__ if isinstance(part, type) else type(part).__name__
        made = ", made" if isinstance(part, type) and issubclass(part, kind) else ""
        raise PartError(f"{setting}: {given} is no {contract}; give a subclass of it{made}")
    taken = set(inspect.signature(type(part)).parameters)
    told = {one.name for one in fields(part) if one.init} if is_dataclass(part) else set()
    if taken != told:
        raise PartError(
            f"{setting}: {type(part).__name__} takes {', '.join(sorted(taken - told)) or 'less than its fields'}: the "
            f"settings of a {kind.__name__} are the fields of a dataclass; put @dataclass(frozen=True) above it, "
            "without an __init__"
        )


def _subclasses(kind: Any) -> list[Any]:
    return [one for sub in kind.__subclasses__() for one in (sub, *_subclasses(sub))]
