"""The page *Extend it*: each part from a file outside of the package, by class path from a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hosfl_lightning.wire import Codec
from tests.recipe_runs import ROOT, hosfl

PAGE = (ROOT / "docs" / "extend.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")


@dataclass
class Part:
    """A section with a file and the lines that lay it over a recipe."""

    title: str
    module: str
    code: str
    recipe: str
    overlay: str


def parts() -> list[Part]:
    found = []
    for section in PAGE.split("\n## ")[1:]:
        [code], [overlay] = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
        [module], [recipe] = re.findall(r"^# (\w+)\.py$", code, re.M), re.findall(r"^# on top of (\S+)$", overlay, re.M)
        found.append(Part(section.splitlines()[0], module, code, recipe, overlay))
    return found


PARTS = parts()
WANTED = {
    "An aggregation rule", "An update rule", "An estimator", "A data module", "A network", "An algorithm", "A callback",
    "A codec",
}  # fmt: skip


def named(value: Any) -> set[str]:
    """Class paths, and whatever else may be one, in a recipe."""
    if isinstance(value, dict):
        return {name for one in value.values() for name in named(one)}
    if isinstance(value, list):
        return {name for one in value for name in named(one)}
    return {value} if isinstance(value, str) else set()


def test_every_kind_of_part_is_there() -> None:
    assert {part.title for part in PARTS} == WANTED


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.module)
def test_a_recipe_runs_with_it_by_its_class_path(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{part.module}.py").write_text(part.code)
    (tmp_path / "mine.yaml").write_text(part.overlay)
    monkeypatch.syspath_prepend(tmp_path)
    paths = [name for name in named(yaml.safe_load(part.overlay)) if name.startswith(f"{part.module}.")]
    small = ["--trainer.max_rounds=2", "--trainer.controls=[]", "--trainer.enable_progress_bar=false"]
    trainer = hosfl(
        "fit", f"--config={ROOT / part.recipe}", f"--config={tmp_path / 'mine.yaml'}", *small,
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    ).trainer  # fmt: skip
    assert trainer.summary["rounds"] == 2
    [name] = [path.rpartition(".")[2] for path in paths]
    held = [trainer.algorithm, *vars(trainer.algorithm).values(), *trainer.callbacks, trainer.datamodule]
    made = {type(one).__name__ for one in [*held, *codecs_of(trainer)]} | {trainer.lightning_module.pretrained}
    assert name in made
    assert ("round 1: 10 clients, loss" in capsys.readouterr().out) == (name == "Diary")


def codecs_of(trainer: Any) -> list[Any]:
    codec = trainer.settings.codec
    return [Codec.known[name] for name in (codec.smashed_data, codec.multiplier, codec.gradient)]
