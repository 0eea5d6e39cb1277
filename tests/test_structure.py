"""Imports point one way: what is lower never imports what is higher."""

from __future__ import annotations

import ast
from pathlib import Path

import hosfl_lightning

PACKAGE = Path(hosfl_lightning.__file__).parent

#: From the command line down to the generator. Modules in one line may import each other.
LAYERS = [
    {"cli", "compare"},
    {"orchestrator", "controls", "settings"},
    {"summary"},
    {"rebuild", "history"},
    {"run_folder"},
    {"checkpoint"},
    {"catch_up", "identity"},
    {"evaluation", "trainer_face"},
    {"hooks"},
    {"algorithms"},
    {"transport", "replay"},
    {"callbacks"},
    {"servers"},
    {"clients"},
    {"aggregation"},
    {"split", "memory", "padding"},
    {"optim"},
    {"wire", "loggers"},
    {"data", "availability"},
    {"rng", "files", "networks"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Top-level parts of the package that a file imports at run time; what only type checkers read does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hosfl_lightning"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_every_part_has_a_place() -> None:
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert parts - {"__init__"} == set(RANK)


def test_imports_point_down() -> None:
    upward = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        upward += [f"{own} -> {other}" for other in imports(path) if RANK[other] < RANK[own]]
    assert upward == []
