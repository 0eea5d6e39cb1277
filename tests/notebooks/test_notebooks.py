"""Every notebook runs from top to bottom, and holds the outputs that its cells give."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tools.run_notebooks import executed

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(?:tmp|home|root|work|Users|usr|opt)/|site-packages")


def code_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: NotebookNode) -> list[set[str]]:
    """What each cell leaves; a stream may come in one piece or in several."""
    return [{output.get("name", "picture or table") for output in cell.outputs} for cell in code_of(notebook)]


def test_the_three_are_there() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEveryNotebook:
    def test_is_stored_with_outputs_and_pictures(self, path: Path) -> None:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = code_of(notebook)
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert "stderr" not in {output.get("name") for output in outputs}
        assert path.stat().st_size < 200 * 1024

    def test_says_nothing_of_the_machine(self, path: Path) -> None:
        for cell in code_of(nbformat.read(path, as_version=4)):
            for output in cell.outputs:
                text = {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
                assert not MACHINE.search(f"{output.get('text', '')}{text}")

    def test_runs_and_leaves_what_is_stored(self, path: Path, tmp_path: Path) -> None:
        assert kinds(executed(path, tmp_path)) == kinds(nbformat.read(path, as_version=4))
