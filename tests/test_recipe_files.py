"""A key of a recipe that is none, said before anything is imported: what the parser says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hosfl_lightning import recipe
from hosfl_lightning.mistyped import mistyped
from tests.recipe_runs import ROOT

QUICKSTART = f"--config={ROOT / 'recipes' / 'quickstart.yaml'}"
WRONG = [
    "trainer: {max_round: {a: {b: 1}, c: 2}}",
    "traner: {algorithm: {class_path: a.B}, max_rounds: 3}",
    "modle.cut: 3",
    "max_rounds: 3",
    "trainer: {callbacks: [], callbackss+: []}",
    "trainer: {max_rounds: 3\nmodel: [",
]


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return tmp_path / "overlay.yaml"


@pytest.mark.parametrize("text", WRONG)
def test_it_says_what_the_parser_says(text: str, overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay.write_text(text)
    args = [QUICKSTART, f"--config={overlay}"]
    with pytest.raises((SystemExit, ValueError)) as ended:
        recipe.command(["fit", *args])
    said = capsys.readouterr().err.removeprefix("hosfl: error: ").rstrip() or str(ended.value)
    assert said == mistyped("fit", args)


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "- 1", "modle: {}", "1: 2", "trainer: {1: 2}", "trainer: other.yaml", "trainer: null",
        "trainer: {zzz: 3, yyy: 1}", "zzz: 3\ntrainer: {zzz: 3}",
        "trainer: {max_round: 3}\nmodle: {cut: 1}", "trainer: {max_rounds: {x: 3}}",
        "trainer: {algorithm: {init_args: {prbes: 3}}}", "model: {class_path: my.Model, init_args: {cutt: 3}}",
        "data: {batch: 3}", "model.cut: 3", "trainer: {callbacks+: []}", "ckpt_path: x",
    ],
)  # fmt: skip
def test_in_doubt_it_is_the_parsers(text: str, overlay: Path) -> None:
    overlay.write_text(text)
    assert mistyped("fit", [QUICKSTART, f"--config={overlay}"]) is None


def test_every_recipe_passes() -> None:
    for path in (ROOT / "recipes").rglob("*.yaml"):
        if path.parent.name != "compare":  # whose files are no recipes of one run
            assert mistyped("serve", [f"--config={path}"]) is None, path
