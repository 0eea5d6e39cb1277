"""The tables and lines of docs/partition.md are what its code prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import data

PAGE = Path(__file__).parents[2] / "docs" / "partition.md"


def test_sizes_are_those_that_the_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n# runnable\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for code in blocks[:4]:
        exec(code, names)
    lines = [line for line in text.splitlines() if re.match(r"\| .*\| \d+ \| [\d.]+ \| \d+ \|", line)]
    assert lines == names["rows"]
    said = [line.strip() for line in text.splitlines() if line.startswith("    Dirichlet: ")]
    assert said == [line for line in capsys.readouterr().out.splitlines() if line.startswith("Dirichlet: ")]


def test_every_partitioner_is_in_the_first_table_and_runs() -> None:
    text = PAGE.read_text()
    kinds = data.Partitioner.__subclasses__()
    shipped = {kind.__name__ for kind in kinds if kind.__module__.startswith("hosfl_lightning.")}
    assert shipped == set(re.findall(r"^\| `(\w+)\(.*\| (?:nothing|labels|fields|files) \|$", text, flags=re.MULTILINE))
    assert shipped <= set(re.findall(r"\w+", "".join(re.findall(r"# runnable\n(.*?)```", text, flags=re.DOTALL))))
    assert shipped <= set(data.__all__)
