"""The clients' own steps follow the rule as the server's messages say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hosfl_lightning.aggregation import UpdateError, prescribe
from hosfl_lightning.optim import SGD, AdamW, Dense, UpdateRule, ZerothOrder
from hosfl_lightning.wire import StepRequest, decode, encode

RULES = {
    "sgd": SGD(lr=0.1, weight_decay=0.3),
    "momentum": SGD(lr=0.1, momentum=0.9),
    "adamw": AdamW(lr=0.1, weight_decay=0.2, betas=(0.8, 0.95)),
}
SIZES = [7, 2]


def optimizer_of(rule: UpdateRule) -> ZerothOrder:
    """Two tensors in two groups."""
    generator = torch.Generator().manual_seed(0)
    first, second = (nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES)
    optimizer = ZerothOrder([first], rule)
    optimizer.add_param_group({"params": [second]})
    return optimizer


def step(optimizer: ZerothOrder, number: int) -> None:
    basis = Dense(SIZES)
    optimizer.record(torch.randn(basis.size, generator=torch.Generator().manual_seed(number)), basis)
    optimizer.step()


def bits(optimizer: ZerothOrder) -> list[Tensor]:
    moments = [optimizer.state[p][slot] for p in optimizer.parameters for slot in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in [*optimizer.parameters, *moments]]


def sent(rule: Mapping[str, Any], round: int = 0) -> dict[str, Any]:
    """As it arrives."""
    request = decode(encode(StepRequest(round, 3, rule=dict(rule))))
    assert isinstance(request, StepRequest)
    return request.rule


@pytest.mark.parametrize("rule", RULES)
def test_a_client_without_a_schedule_steps_as_the_servers_schedule_says(rule: str) -> None:
    """Of several local steps a round; and with other settings of its own than the run's."""
    server, client = optimizer_of(RULES[rule]), optimizer_of(type(RULES[rule])(lr=7.0))
    schedule = LambdaLR(server, lambda round: 0.5**round)
    for round in range(4):
        prescribe(client, sent(server.prescription, round), f"the request of round {round}")
        for local in range(2):
            step(server, 2 * round + local)
            step(client, 2 * round + local)
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(bits(client), bits(server), strict=True))
    assert client.steps == server.steps == 8
    assert client.param_groups[0]["lr"] == 0.1 * 0.5**3


def test_every_group_has_the_settings_and_nothing_has_moved() -> None:
    client = optimizer_of(AdamW(lr=7.0, weight_decay=0.0, betas=(0.1, 0.1), eps=1.0))
    step(client, 0)
    before = bits(client)
    prescribe(client, sent(optimizer_of(RULES["adamw"]).prescription), "the request")
    for group in client.param_groups:
        assert {name: group[name] for name in ("lr", "weight_decay", "betas", "eps", "step")} == {
            "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-8, "step": 1,
        }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(bits(client), before, strict=True))


SGD_RULE: dict[str, Any] = {"name": "SGD", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({}, "is for the rule None, the client's optimizer is SGD"),
        (SGD_RULE | {"name": "AdamW"}, "is for the rule AdamW, the client's optimizer is SGD"),
        ({"name": "SGD", "lr": 0.1}, r"has the settings \['lr'\] of SGD, not \['lr', 'momentum', 'weight_decay'\]"),
        (SGD_RULE | {"nesterov": True}, r"has the settings .*'nesterov'.* of SGD, not"),
        (SGD_RULE | {"lr": "x"}, "has lr = 'x'; SGD needs one like 5.0"),
        (SGD_RULE | {"lr": True}, "has lr = True; SGD needs one like 5.0"),
        (SGD_RULE | {"lr": math.nan}, "has lr = nan; SGD needs one like 5.0"),
        (SGD_RULE | {"lr": [0.1]}, r"has lr = \(0.1,\); SGD needs one like 5.0"),
        (SGD_RULE | {"lr": -1.0}, ": SGD: lr must be >= 0, got -1.0"),
        (SGD_RULE | {"momentum": 1.0}, r": SGD: momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_and_changes_nothing(rule: dict[str, Any], match: str) -> None:
    client = optimizer_of(SGD(lr=5.0, momentum=0.5))
    before = [{name: value for name, value in group.items() if name != "params"} for group in client.param_groups]
    with pytest.raises(UpdateError, match=f"^the request of round 4 ?{match}"):
        prescribe(client, rule, "the request of round 4")
    after = [{name: value for name, value in group.items() if name != "params"} for group in client.param_groups]
    assert after == before
    prescribe(client, SGD_RULE, "the request of round 4")
    assert client.prescription == SGD_RULE
