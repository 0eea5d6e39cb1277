"""What runs must have in common to be compared, and whether they had."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.identity import digest
from hosfl_lightning.run_folder import IDENTITY

#: Written into a run folder of a comparison when the fit is over.
CONDITIONS = "conditions.json"


def conditions(data: FederatedDataModule) -> dict[str, Any]:
    """The examples of each client and of the held-out sets, by number, and every client's first batch, by its bits."""
    batches = {f"{k}.{n}": t for k in range(data.num_clients) for n, t in sorted(data.client_batch(k, 0).items())}
    return {
        "examples": [len(examples) for examples in data.clients],
        "validation examples": len(data.validation_set),
        "test examples": len(data.test_set),
        "batches": digest(batches),
    }


def unequal(runs: Iterable[tuple[str, int, Path]]) -> str | None:
    """The first two runs of one seed that did not begin with the same weights and data, in words.

    Args:
        runs: Method, seed and folder of each; of what a folder does not tell nothing is said.
    """
    first: dict[tuple[int, str], tuple[str, Any]] = {}
    for method, seed, folder in runs:
        for name, value in _known(folder).items():
            other, known = first.setdefault((seed, name), (method, value))
            if known != value:
                return f"{other} and {method} differ in their {name} under seed {seed}"
    return None


def _known(folder: Path) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if (folder / IDENTITY).is_file():
        known["initial weights"] = json.loads((folder / IDENTITY).read_text())["start"]
    if (folder / CONDITIONS).is_file():
        known |= json.loads((folder / CONDITIONS).read_text())
    return known
