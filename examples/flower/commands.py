"""The commands of ``hosfl`` within an app of Flower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def run(command: Callable[[list[str]], object], settings: dict[str, object]) -> None:
    """A command with ``--name=value`` of what is set; an empty string is not.

    Raises:
        RuntimeError: It would have ended with one line for the user, which Flower is to report.
    """
    try:
        command([f"--{name}={value}" for name, value in settings.items() if value not in ("", None)])
    except SystemExit as end:
        if isinstance(end.__cause__, ValueError):
            raise RuntimeError(str(end.__cause__)) from end
        raise  # Flower's own: the run is stopped


def file(name: object) -> str:
    """A file of the machine, or of the app."""
    return str(HERE / str(name)) if name else ""
