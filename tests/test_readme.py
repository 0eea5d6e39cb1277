from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word but for its size."""
    small = (
        BLOCKS[0]
        .replace("max_rounds=20", "max_rounds=1")
        .replace(
            "DocstringData()", "DocstringData(batch_size=1, sequence_length=32, max_bytes_per_client=20000, **held_out)"
        )
    )
    assert small.count("max_rounds=1") == small.count("held_out") == 1
    monkeypatch.chdir(tmp_path)
    exec(small, {"held_out": {"validation_bytes_per_client": 1500, "test_bytes_per_client": 1500}})
    assert (tmp_path / "runs" / "version_0" / "summary.json").is_file()


def test_a_first_screen_in_its_order() -> None:
    """What and why, a picture, the commands and what they print, Python, the callback, who it is for, links."""
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    screen = lines[: next(i for i, line in enumerate(lines) if line.startswith("## "))]
    assert len(screen) <= 40
    marks = ["**Fine-tune", "![", "    pip install", "| client |", "```python", "In a Light", "**Is it for me?", "["]
    places = [next(i for i, line in enumerate(screen) if line.startswith(mark)) for mark in marks]
    assert places == sorted(places)


def test_links_and_pictures_are_there() -> None:
    local = [link for link in re.findall(r"\]\(([^)]+)\)", README.read_text()) if not link.startswith("http")]
    assert local
    assert [link for link in local if not (README.parent / link).exists()] == []
