"""What benchmarks of rows and seeds have in common: what was found before, and the file and table that grow."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hosfl_lightning.files import write_json, write_whole
from hosfl_lightning.run.identity import hardware


def load(path: Path) -> dict[str, Any]:
    """What was found before; no run, where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    return found


def write(
    found: dict[str, Any], path: Path, words: str, names: Sequence[str], page: Callable[[dict[str, Any]], str]
) -> None:
    """The file and ``table.md`` beside it, runs in the order of the rows.

    Args:
        found: ``runs``, each with ``row`` and ``seed``, and what else there is.
        path: The JSON file.
        words: The command.
        names: Of the rows, in order.
        page: The table of it.
    """
    order = {name: place for place, name in enumerate(names)}
    found |= {
        "command": words, "date": datetime.date.today().isoformat(), "machine": hardware(torch.device("cpu")),
        "runs": sorted(found["runs"], key=lambda one: (order[one["row"]], one["seed"])),
    }  # fmt: skip
    write_json(path, found, indent=1)
    write_whole(path.parent / "table.md", lambda file: file.write(page(found).encode()))
