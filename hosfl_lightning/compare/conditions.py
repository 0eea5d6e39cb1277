"""What runs must have in common to be compared, and whether they had."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hosfl_lightning.data import FederatedDataModule
from hosfl_lightning.run.folder import IDENTITY
from hosfl_lightning.run.identity import digest

#: Written into a run folder of a comparison when the fit is over.
CONDITIONS = "conditions.json"


def conditions(data: FederatedDataModule) -> dict[str, Any]:
    """The examples of each client and of the held-out sets, by number, and every client's first batch, by its bits."""
    batches = {f"{k}.{n}": t for k in data.holders for n, t in sorted(data.client_batch(k, 0).items())}
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
    first: dict[tuple[int, str, str], tuple[str, Any]] = {}
    for method, seed, folder in runs:
        for (name, kind), value in _known(folder).items():
            other, known = first.setdefault((seed, name, kind), (method, value))
            if known != value:
                return f"{other} and {method} differ in their {name} under seed {seed}"
    return None


def _known(folder: Path) -> dict[tuple[str, str], Any]:
    """Values by name and kind: only those of one kind must be equal."""
    known: dict[tuple[str, str], Any] = {}
    if (folder / IDENTITY).is_file():
        # Rows may differ in the adapter of their clients; the server is the same for all of them.
        for half, start in json.loads((folder / IDENTITY).read_text()).get("starts", {}).items():
            kind = start["tensors"] if half == "client_half" else ""
            known[f"initial weights of the {half.removesuffix('_half')}", kind] = start["weights"]
    if (folder / CONDITIONS).is_file():
        known |= {(name, ""): value for name, value in json.loads((folder / CONDITIONS).read_text()).items()}
    return known
