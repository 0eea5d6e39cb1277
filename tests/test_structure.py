"""Imports point one way: what is lower never imports what is higher, and no file is tied to itself by a circle.

`hosfl_client` is below all of `hosfl_lightning`, and knows nothing of PyTorch.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hosfl_client
import hosfl_lightning

PACKAGE = Path(hosfl_lightning.__file__).parent
CLIENT = Path(hosfl_client.__file__).parent

#: From the command line down to the generator. Parts in one line do not import each other.
LAYERS = [
    ["cli"],
    ["advise", "attack", "compare", "client_command", "device"],
    ["recipe"],
    ["orchestrator"],
    ["run"],
    ["callbacks"],
    ["algorithms"],
    ["server"],
    ["fleet"],
    ["join"],
    ["clients"],
    ["aggregation"],
    ["models"],
    ["split", "memory", "padding"],
    ["optim"],
    ["wire", "loggers", "mistyped"],
    ["data", "availability", "link", "recipe_files"],
    ["privacy", "rng", "files", "networks", "moved", "parts", "rendering", "arguments", "gguf", "usage"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
#: Lines of a file at most; of those that once grew, fewer.
LONGEST, BOUNDS = 350, {"orchestrator.py": 330}


#: What needs numpy and nothing else; `wire` not even that.
NUMPY = [
    "arrays", "basis", "basis_of", "beside", "bfloat16", "client_directions", "codec", "codecs", "gelu", "head",
    "messages", "optimizer", "padding", "privacy", "rng", "rules",
]  # fmt: skip
HEAVY = {"torch", "hosfl_lightning", "lightning", "transformers", "grpc", "onnxruntime", "tokenizers"}


def files(package: Path = PACKAGE) -> Iterator[tuple[str, Path]]:
    """Module names and files of a package, but for its face, which names what is in all of it."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != package.name:
            yield name, path


def imports(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports, wherever in it, also those that only type checkers read."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= named or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    modules = {name for name, _ in files()}
    return {name: imports(path, modules) for name, path in files()}


def test_every_part_has_a_place(arrows: dict[str, set[str]]) -> None:
    assert {room(module) for module in arrows} == set(RANK)


def test_imports_point_down(arrows: dict[str, set[str]]) -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in arrows.items()
        for other in others
        if room(other) != room(module) and RANK[room(other)] <= RANK[room(module)]
    ]
    assert upward == []


@pytest.mark.parametrize("package", [PACKAGE, CLIENT], ids=lambda package: package.name)
def test_no_file_is_in_a_circle(package: Path) -> None:
    """A package's face imports what is in it; whoever imports the face from inside is tied to all of it."""
    modules = {name for name, _ in files(package)}
    left = {name: imports(path, modules) for name, path in files(package)}
    while ends := [module for module, others in left.items() if not others & left.keys()]:
        for module in ends:
            del left[module]
    assert sorted(left) == []


@pytest.mark.parametrize("package", [PACKAGE, CLIENT], ids=lambda package: package.name)
def test_no_file_is_long(package: Path) -> None:
    lengths = {path.relative_to(package).as_posix(): len(path.read_text().splitlines()) for _, path in files(package)}
    assert {name: n for name, n in lengths.items() if n > BOUNDS.get(name, LONGEST)} == {}


def test_clients_never_import_the_server() -> None:
    """What a device runs needs nothing of what stands above it."""
    code = "import sys, hosfl_lightning.clients; print(*(m for m in sys.modules if m.startswith('hosfl_lightning.')))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    above = {name for names in LAYERS[: RANK["clients"]] for name in names}
    assert not {room(module) for module in told} & above


def test_a_device_needs_no_pytorch() -> None:
    """Wherever in a file the import stands, and whether or not a test runs it."""
    roots = {
        (name, (imported or "").split(".")[0])
        for name, path in files(CLIENT)
        for node in ast.walk(ast.parse(path.read_text()))
        for imported in named(node)
    }
    assert [(name, root) for name, root in sorted(roots) if root in {"torch", "hosfl_lightning", "lightning"}] == []


def named(node: ast.AST) -> list[str | None]:
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize(("rooms", "without"), [(["wire"], HEAVY | {"numpy"}), (["wire", *NUMPY], HEAVY)])
def test_messages_and_arithmetic_need_numpy_alone(rooms: list[str], without: set[str]) -> None:
    modules = [name for name, _ in files(CLIENT) if room(name) in rooms]
    assert {room(module) for module in modules} == set(rooms)
    code = f"import sys, {', '.join(modules)}; print(*{{m.split('.')[0] for m in sys.modules}})"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(CLIENT.parent)},
    ).stdout.split()  # fmt: skip
    assert not without & set(told)
