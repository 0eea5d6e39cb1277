from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hosfl_lightning.algorithms import FedAvg
from hosfl_lightning.wire import Codecs
from tests.algorithms.plain_rounds import Reference, average_, method, two_layers
from tests.algorithms.two_layers import Crossing, Points, TwoLayers, assert_equal, orchestrator, plain


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_an_independent_implementation(steps: int, rule: str, tmp_path: Path) -> None:
    algorithm = method(FedAvg, rule, local_steps=steps)
    model, data, trainer = two_layers(rule), Points(), orchestrator(algorithm, tmp_path)
    trainer.fit(model, data)
    reference, net = Reference(data, rule), nn.Sequential(*plain(two_layers(rule)))
    for r in range(5):
        trained, seen = [], []
        for k in trainer.sample(r):
            own = deepcopy(net)
            seen.append(reference.train(own, k, r, steps, reference.optimizer(k, own.parameters(), r)))
            trained.append(own)
        average_(net, trained, seen)
    assert_equal(model, net[0], net[1])


def test_nothing_but_weights_travels_and_no_line_says_that_labels_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crossing = Crossing()
    trainer = orchestrator(method(FedAvg, local_steps=2), tmp_path, callbacks=[crossing])
    trainer.fit(two_layers(), Points())
    assert {sent.kind for sent in trainer.fleet.channel.ledger} == {"weights", "round_end"}
    assert {message.kind for message in crossing.up} == {"weights"}
    assert "Labels travel" not in capsys.readouterr().out
    assert trainer.summary["memory"]["server_peak_bytes"] == 0


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({}, {}, r"FedAvg trains the whole model[^;]*client_holds is half[^;]*; set it to whole"),
        ({"codec": Codecs(smashed_data="int8")}, {"client_holds": "whole"}, r"trainer\.codec: .* leave it out"),
    ],
)
def test_refused_before_anything_is_written(
    settings: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = orchestrator(method(FedAvg), tmp_path / "runs", logger=True, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.fit(TwoLayers(**model), Points())
    assert not (tmp_path / "runs").exists()
