"""What is said before anything is imported: what the parser says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hosfl_lightning import recipe
from hosfl_lightning.cli import OF_A_RUN
from hosfl_lightning.mistyped import mistyped, options
from tests.recipe_runs import ROOT

QUICKSTART = f"--config={ROOT / 'recipes' / 'quickstart.yaml'}"
WRONG = [
    ["fit", "--trainer.max_round", "3", "4", QUICKSTART],
    ["fit", "--config", "quikstart.yaml", "--trainer.max_round=3"],
    ["fit", "--trainer.algoritm.probes=3", "--trainer.seeds=1", "-c", str(ROOT / "recipes" / "quickstart.yaml")],
    ["validate", QUICKSTART, "--max_rounds=3"],
    ["export", QUICKSTART, "--ckpt_path=x", "--ou", "x"],
]


def test_the_options_are_the_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: dict[str, recipe.Parser] = {}

    def stop(self: recipe.Parser, *args: object, **kwargs: object) -> None:
        parsers.update(self._subcommands_action.choices)
        raise SystemExit

    monkeypatch.setattr(recipe.Parser, "parse_args", stop)
    with pytest.raises(SystemExit):
        recipe.command(["fit"])
    assert {name: options(name) for name in OF_A_RUN} == {name: parsers[name].names() for name in OF_A_RUN}


@pytest.mark.parametrize("args", WRONG, ids=lambda args: " ".join(args[:2]))
def test_it_says_what_the_parser_says(
    args: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        recipe.command(args)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"hosfl: error: {mistyped(args[0], args[1:])}\n"


@pytest.mark.parametrize(
    "args",
    [
        [], [QUICKSTART], ["--trainer.algorithm.probes=3"], ["--trainer.algorithm", "my.Method"], ["--data.x", "3"],
        ["--trainer.callbacks+=my.Callback", "--trainer.callbacks.x", "-1"], ["--model.init_args.lora.client=null"],
        ["--help"], ["--trainer.algorithm.help=my.Method", "--x"], ["--print_config", "--x"],
        ["x", "--trainer.seeds=1"], ["--config", "https://a.b/c.yaml"], ["--config=seed_everything: 1"],
        ["--trainer.seeds=1", "--", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_in_doubt_it_is_the_parsers(args: list[str]) -> None:
    assert mistyped("fit", args) is None


def test_an_option_without_what_stands_before_it_has_a_hint() -> None:
    assert str(mistyped("fit", ["--some.where.else.seed=1"])).endswith("; did you mean --trainer.seed?")


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys; from hosfl_lightning.cli import main\n"
        "try: main(['fit', '--trainer.max_round=3'])\nfinally: print(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "did you mean --trainer.max_rounds?" in ended.stderr
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & set(ended.stdout.split())
