"""Modules that have moved: whoever imports one by its old name gets it, and one line that says the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Old name: new name, below the package; what is in a moved package and has gone elsewhere stands before it.
MOVED: dict[str, str] = {
    **{f"callbacks.{name}": f"callbacks.drop_in.{name}" for name in (
        "batch_state", "cut_check", "hybrid_order", "lower_graph", "lower_part", "repeat_check", "replayed_client",
        "resumed", "silence", "step_memory", "trainer_check", "zeroth_order_training",
    )},
    **{name: f"run.{name}" for name in (
        "checkpoint", "controls", "evaluation", "history", "hooks", "identity", "rebuild", "settings", "summary",
    )},
    "catch_up": "server.catch_up",
    "replay": "server.replay_log",
    "run_folder": "run.folder",
    "servers.server": "server.server",
    "servers": "models",
    "trainer_face": "run.face",
    "transport.in_process": "fleet.channel",
    "transport": "fleet",
}  # fmt: skip


class Moved(MetaPathFinder, Loader):
    """Finds old names."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Of an old name, or of a module in a package that has one."""
        return ModuleSpec(fullname, self) if new_name(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its new name."""
        new = new_name(spec.name)
        assert new is not None  # or it would not have been found
        warnings.warn(f"{spec.name} is now {new}", FutureWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already, under its own name, which it keeps."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def new_name(fullname: str) -> str | None:
    """Where a module of the package is now; None: it has not moved."""
    package, _, name = fullname.partition(".")
    if package != __name__.partition(".")[0]:
        return None
    for old, new in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            return f"{package}.{new}{name.removeprefix(old)}"
    return None


def install() -> None:
    """Once a process."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, Moved())  # or what is in a moved package would be loaded twice
