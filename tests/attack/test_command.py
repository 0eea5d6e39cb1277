"""``hosfl attack`` on a run: what must succeed does, what cannot be tried is named, and the files are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import HOSFL
from hosfl_lightning.attack import log
from hosfl_lightning.attack.command import Attacker
from hosfl_lightning.callbacks import KeepMessages
from hosfl_lightning.callbacks.keep_messages import KeptError
from hosfl_lightning.cli import main
from hosfl_lightning.data import DigitsData
from hosfl_lightning.models import SplitImageClassifier
from hosfl_lightning.networks import ConvNet
from hosfl_lightning.optim import SGD
from hosfl_lightning.wire import Codecs
from tests.random_tokens import RandomTokens
from tests.recipe_runs import ROOT, command_line

ENTRY = {"enable_progress_bar": False, "logger": False}


def rows(told: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(one["attack"], one["measure"]): one for one in told["scores"]}


def test_a_language_model_s_text_is_read_off_its_messages(
    make_model: Callable[..., Any], make_orchestrator: Callable[..., Any], tmp_path: Path
) -> None:
    data = RandomTokens([[9, 12, 7], [6, 10, 10], [12, 11, 3]], batch_size=1)
    algorithm = HOSFL(client_optimizer=SGD(lr=2.0), probes=4)
    trainer = make_orchestrator(algorithm, callbacks=[KeepMessages(rounds=3)], enable_checkpointing=True)
    trainer.fit(make_model(), data)
    run, out = Path(trainer.log_dir), tmp_path / "out"
    attacker = Attacker(HOSFL(client_optimizer=SGD(lr=2.0), probes=4), **ENTRY)
    told = attacker.attack(make_model(), data, str(run), ["labels", "search", "multiplier", "membership"], str(out), 9)
    found = rows(told)
    # θ_c has moved by then: with that of the start some tokens of the later rounds are not found.
    assert found["search", "tokens"]["value"] == 1.0 > found["search", "tokens"]["trivial"]
    assert found["labels", "labels"]["value"] == 1.0
    assert {one["attack"] for one in told["scores"]} == {"labels", "search", "multiplier", "membership"}
    assert json.loads((out / "attack.json").read_text())["scores"] == json.loads(json.dumps(told))["scores"]
    assert (out / "attack.png").stat().st_size > 10_000
    with pytest.raises(KeptError, match="sent other examples in round 0"):
        attacker.attack(make_model(), RandomTokens([[3], [5, 5], [4]], batch_size=1), str(run), ["labels"], str(out))


def test_images_come_back_and_text_attacks_are_left_out(
    make_orchestrator: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "STARTS", 1)
    monkeypatch.setattr(log, "STEPS", 5)

    def model() -> SplitImageClassifier:
        return SplitImageClassifier(1, 10, 8, 1, network=lambda: ConvNet(1, (8, 16, 32), 10, 8))

    trainer = make_orchestrator(callbacks=[KeepMessages()], max_rounds=2, codec=Codecs(smashed_data="int8"))
    trainer.fit(model(), DigitsData(num_clients=4, batch_size=4))
    told = Attacker(HOSFL(client_optimizer=SGD(lr=0.1)), **ENTRY).attack(
        model(), DigitsData(num_clients=4, batch_size=4), trainer.log_dir, ["search", "inversion", "multiplier", "log"],
        str(tmp_path / "out"), 4,
    )  # fmt: skip
    assert rows(told)["inversion", "pixels explained"]["low"] > 0.5
    assert told["codec"] == "int8" and list(told["left_out"]) == ["search"]
    assert {one["attack"] for one in told["scores"]} == {"inversion", "multiplier", "log"}


def test_refusals_are_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text((ROOT / "recipes/vision/digits_hosfl.yaml").read_text())
    for more, line in ((["--attacks=[serch]"], "did you mean search?"), ([], "Run it anew with trainer.callbacks")):
        with command_line(), pytest.raises(SystemExit):
            main(["attack", "--run", str(tmp_path), *more])
        assert line in capsys.readouterr().err
