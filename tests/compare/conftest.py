from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import cli
from tests.compare.tiny import write
from tests.recipe_runs import command_line


@dataclass
class Compared:
    """A comparison that is done."""

    config: Path
    out: Path

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())

    @property
    def table(self) -> str:
        return (self.out / "table.md").read_text()

    def run(self, method: str, name: str) -> Path:
        return self.out / "runs" / method / name


def hosfl(*args: str) -> None:
    with command_line():
        cli.main(list(args))


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    root = tmp_path_factory.mktemp("compared")
    config = write(root)
    hosfl("compare", f"--config={config}", f"--out={root / 'out'}")
    return Compared(config, root / "out")
