"""What is mistyped on a command line, said before anything has to be imported.

It knows what the parser knows: the options of a run's commands are the arguments of `Orchestrator`, which are read from
its source. Whatever it is not sure of is the parser's to judge.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from hosfl_lightning.rendering import nearest

RECIPES = (".yaml", ".yml")
#: Options of every command that come before those of its method.
BEFORE, AFTER = ("config", "seed_everything", "trainer"), ("model", "data")
#: What the parser has beside settings.
ITS_OWN = re.compile(r"--(help|print_\w+|.*\.help)(=|$)|-h$")


def mistyped(command: str, args: Sequence[str]) -> str | None:
    """The parser's message on a recipe that is not there, or on options or keys that are none; None: go on.

    Args:
        command: Of a run.
        args: Behind it.
    """
    known = options(command)
    rest, given, unknown, recipes = [*args], [], [], []
    while rest:
        arg = rest.pop(0)
        name, has_value, value = arg.partition("=")
        if not name.startswith("-") or arg == "--" or " " in name or ITS_OWN.match(arg):
            return None
        name = "config" if name == "-c" else name.removeprefix("--").removesuffix("+")
        if name in known or _within(name, known):
            value = value if has_value else rest.pop(0) if rest else ""
            if name == "config" and (missing := _missing(value)):
                return missing
            recipes += [f"--config={value}"] * (name == "config")
        elif not arg.startswith("--"):
            return None
        else:
            given.append(f"--{name}")
            unknown.append(arg)
            while rest and not rest[0].startswith("-"):
                unknown.append(rest.pop(0))
    if not unknown:
        return _misnamed(command, recipes)
    return f"unrecognized arguments: {' '.join(unknown)}{meant(given, [f'--{name}' for name in known])}"


def meant(given: Iterable[str], names: list[str]) -> str:
    """The hint on the first of some options that are none; they may lack what stands before the last part."""
    return next(filter(None, (nearest(one, names) or _ending(one, names) for one in given)), "")


@cache
def options(command: str) -> list[str]:
    """Of a command on a run, in the parser's order, without dashes."""
    tree = ast.parse(Path(__file__).with_name("orchestrator.py").read_bytes())
    [run] = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Orchestrator")
    methods = {node.name: node.args.args for node in run.body if isinstance(node, ast.FunctionDef)}
    settings = [f"trainer.{one.arg}" for one in methods["__init__"][1:]]
    return [*BEFORE, *settings, *AFTER, *(one.arg for one in methods[command][3:])]  # behind self, model and data


def _within(name: str, known: list[str]) -> bool:
    """A setting of a setting, of which only its class knows."""
    return any(name.startswith(f"{one}.") for one in known if one != "trainer")


def _misnamed(command: str, recipes: list[str]) -> str | None:
    """On a key of the recipes that is none; of several, it is the parser that knows which to name."""
    from hosfl_lightning.recipe_files import leaves, located, read_files  # a tenth of a second

    known = options(command)
    try:
        files = read_files(recipes)
    except ValueError as error:
        return str(error)
    every = (leaf for content in files.values() for leaf in leaves(content))
    wrong = [leaf for leaf in every if leaf.removesuffix("+") not in known and not _within(leaf, known)]
    keys = {tuple(leaf.split(".")[: 1 + leaf.startswith("trainer.")]) for leaf in wrong}
    if len(keys) != 1 or not keys.pop()[-1].removesuffix("+").isidentifier():
        return None
    line = f"Subcommand '{command}' does not accept option '{wrong[0]}'"
    return located(line + nearest(wrong[0], known), files)


def _missing(recipe: str) -> str | None:
    if not recipe.endswith(RECIPES) or "://" in recipe or os.path.lexists(path := os.path.expanduser(recipe)):
        return None
    return f'Parser key "config": File does not exist: {os.path.join(os.getcwd(), path)!r}'


def _ending(option: str, names: list[str]) -> str:
    """The hint for an option that lacks what stands before its last part."""
    lasts = {name.rpartition(".")[2]: name for name in names}
    near = get_close_matches(option.removeprefix("--").rpartition(".")[2], lasts, n=1, cutoff=0.7)
    return f"; did you mean {lasts[near[0]]}?" if near else ""
