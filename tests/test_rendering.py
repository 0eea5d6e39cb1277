"""A name that is mistyped comes with the nearest: on the command line and in YAML, of keys, classes and choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import cli
from hosfl_lightning.models import base
from hosfl_lightning.rendering import nearest
from tests.recipe_runs import QUICKSTART, ROOT, command_line

COMPARISON = ROOT / "recipes" / "compare" / "quickstart.yaml"
METHOD = "trainer.algorithm.init_args"
#: What is mistyped, as a dotted key and its value, and what was meant.
MISTYPED = {
    "trainer.max_round=3": "trainer.max_rounds",
    "trainr.max_rounds=3": "trainer.max_rounds",
    "model.init_args.cutt=3": "cut",
    "model.init_args.lora.client.alhpa=3": "alpha",
    "model.init_args.optimizer.init_args.lrr=1": "lr",
    f"{METHOD}.probez=3": "probes",
    f"{METHOD}.client_optimizer.init_args.weight_decai=1": "weight_decay",
    f"{METHOD}.client_optimizer=hosfl_lightning.optim.AdmW": "hosfl_lightning.optim.AdamW",
    f"{METHOD}.estimator=centrl": "central",
    "trainer.algorithm=HOSFLL": "HOSFL",
    "trainer.algorithm=hosfl_lightning.algorithm.HOSFL": "hosfl_lightning.algorithms",
    "model=hosfl_lightning.models.SplitCausalML": "hosfl_lightning.models.SplitCausalLM",
    "data=hosfl_lightning.data.DocstringsData": "hosfl_lightning.data.DocstringData",
    "trainer.codec.multiplyer=int8": "multiplier",
    "trainer.simulation=per_clent": "per_client",
}


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken ends at once."""

    def hold(*_: Any, **__: Any) -> None:
        raise ValueError("it was taken")

    monkeypatch.setattr(base, "hold", hold)


def line_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that the command ends with."""
    with command_line(), pytest.raises(SystemExit) as end:
        cli.main([*args])
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("hosfl: error: ")
    return line


@pytest.mark.parametrize("where", ["command line", "YAML"])
@pytest.mark.parametrize("given", MISTYPED)
def test_the_nearest_name_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, given: str, where: str) -> None:
    meant = MISTYPED[given]
    if where == "YAML":
        key, _, value = given.partition("=")
        settings: Any = {"class_path": value} if key in ("model", "data") else value
        for name in reversed(key.split(".")):
            settings = {name: settings}
        (tmp_path / "mine.yaml").write_text(json.dumps(settings))
        extra = f"--config={tmp_path / 'mine.yaml'}"
    else:
        extra = f"--{given}"
    line = line_of(capsys, "fit", f"--config={QUICKSTART}", extra)
    assert line.endswith((f"; did you mean {meant}?", f"; did you mean --{meant}?"))
    assert "Namespace" not in line
    assert "Expected a path" not in line


@pytest.mark.parametrize(
    ("args", "end"),
    [
        (["fitt"], "; did you mean fit?"),
        (["fit", "--confg=x"], "; did you mean --config?"),
        (["serve", f"--config={QUICKSTART}", "--lisen=x"], "; did you mean --listen?"),
        (["export", f"--config={QUICKSTART}", "--ckpt_path=x", "--ou=x"], "; did you mean --out?"),
        (["export", f"--config={QUICKSTART}", "--ckpt_path=x"], "arguments are required: --out"),
        (["replay", f"--config={QUICKSTART}", "--run=x"], "arguments are required: --out"),
        (["compare", f"--config={COMPARISON}"], "arguments are required: --out"),
        (["compare", f"--config={COMPARISON}", "--out=x", "--budget.round=3"], "; did you mean --budget.rounds?"),
        (["compare", f"--config={COMPARISON}", "--out=x", "--only=[HO-SFLL]"], "; did you mean HO-SFL?"),
        (["report", "--runs", "a", "--outt=x"], "; did you mean --out?"),
        (["report", "--out=x"], "arguments are required: --runs"),
        (["join", "--serve=a:1"], "; did you mean --server?"),
        (["certs", "inti"], "; did you mean init?"),
        (["certs", "init", "--outt=x"], "required: --out (got --outt; did you mean --out?)"),
        (["certs", "init", "--out=x", "--dais=3"], "; did you mean --days?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_of_every_command(capsys: pytest.CaptureFixture[str], args: list[str], end: str) -> None:
    assert line_of(capsys, *args).endswith(end)


def test_where_none_is_near_those_that_are_there_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "fit", f"--config={QUICKSTART}", "--model.init_args.lora.client.width=3")
    assert line.endswith("'width' is not accepted; there are r, alpha, target_modules, dropout")


def test_of_two_that_are_about_as_near_both_are_told() -> None:
    assert nearest("HOSLF", ["HOSFL", "HOSL", "ZOFL"]).startswith("; did you mean HOSL")
    assert nearest("clint", ["client", "clients"]) == "; did you mean client?"
    assert nearest("abed", ["abad", "abcd", "zzzz"]) in ("; did you mean abad or abcd?", "; did you mean abcd or abad?")
    assert nearest("nothing", ["like", "it"]) == ""
