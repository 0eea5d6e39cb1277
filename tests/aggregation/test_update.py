"""The record of a round, and that applying it later gives what living through the round gave."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hosfl_client.wire import Frames
from hosfl_lightning import HOSFL, aggregation
from hosfl_lightning.aggregation import MEAN, AggregationRule, Median, UpdateError, apply_update, combine, recorded
from hosfl_lightning.callbacks.drop_in import hybrid_order
from hosfl_lightning.optim import SGD, AdamW, Basis, Dense, UpdateRule, ZerothOrder
from hosfl_lightning.rng import DISTRIBUTIONS
from hosfl_lightning.wire import AddressError, ProjectedGradients, TooLargeError, Update, decode, encode
from tests.callbacks.drop_in.plain_modules import LIGHTNING_WARNINGS, fit, hybrid, mlp

pytestmark = LIGHTNING_WARNINGS

ROUNDS = 6
SHAPES = [(5, 3), (), (40,)]

RULES = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.1, momentum=0.9),
    "sgd-decay": SGD(lr=0.1, weight_decay=0.3, momentum=0.5),
    "adamw": AdamW(lr=0.1, weight_decay=0.2, betas=(0.8, 0.95)),
}
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "halved": lambda step: 0.5 ** (step >= ROUNDS // 2),
    "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * step / ROUNDS),
}


def _optimizer(rule: UpdateRule, distribution: str = "rademacher", dtype: torch.dtype = torch.float32) -> ZerothOrder:
    """As any client starts; one group of parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    return ZerothOrder(parameters, rule, probes=3, distribution=distribution, seed=2**40 + 1)


def _answers(round: int, basis: Basis) -> list[ProjectedGradients]:
    generator = torch.Generator().manual_seed(round)
    return [
        ProjectedGradients(round, k, basis.describe(), torch.randn(basis.size, generator=generator), 2 + k)
        for k in (1, 4, 5)
    ]


def _live(optimizer: ZerothOrder, schedule: Callable[[int], float]) -> Iterable[Update]:
    """Rounds as they are lived: torch's own scheduler, no record read. Yields the records as they come off the wire."""
    scheduler = LambdaLR(optimizer, schedule)
    for round in range(10, 10 + ROUNDS):
        basis = optimizer.basis(round)
        update = combine(_answers(round, basis), optimizer, mu=optimizer.mu)
        optimizer.record(update.coefficients, basis)
        optimizer.step()
        scheduler.step()
        received = decode(encode(update))
        assert isinstance(received, Update)
        yield received


def _bits(optimizer: ZerothOrder) -> list[Tensor]:
    state = [optimizer.state[p][slot] for p in optimizer.parameters for slot in sorted(optimizer.state[p])]
    return [p.detach().clone() for p in optimizer.parameters] + [tensor.clone() for tensor in state]


def _assert_same(actual: ZerothOrder, expected: ZerothOrder) -> None:
    pairs = list(zip(_bits(actual), _bits(expected), strict=True))
    assert all(torch.equal(a, e) for a, e in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rule", RULES)
def test_a_replay_is_the_life_to_the_last_bit(rule: str, schedule: str, distribution: str, dtype: torch.dtype) -> None:
    """The one who comes back late has today's learning rate in hand; the record's is what counts."""
    live, start = (_optimizer(RULES[rule], distribution, dtype) for _ in range(2))
    updates = list(_live(live, SCHEDULES[schedule]))
    today = replace(RULES[rule], lr=live.param_groups[0]["lr"])
    late = _optimizer(today, distribution, dtype)
    for update in updates:
        apply_update(update, late)
    _assert_same(late, live)
    assert not torch.equal(late.parameters[0], start.parameters[0])
    assert late.steps == ROUNDS


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_a_client_that_was_away_catches_up_and_goes_on(rule: str) -> None:
    live, client = _optimizer(RULES[rule]), _optimizer(RULES[rule])
    missed: list[Update] = []
    for update in _live(live, SCHEDULES["cosine"]):
        missed.append(update)
        if update.round not in (12, 13):
            for late in missed:
                apply_update(late, client)
            missed.clear()
            _assert_same(client, live)


def test_every_hyper_parameter_is_the_records() -> None:
    """Not the learning rate alone; and the groups look as if they had been set by hand."""
    update = next(iter(_live(_optimizer(RULES["adamw"]), SCHEDULES["constant"])))
    other = _optimizer(AdamW(lr=7.0, weight_decay=0.0, betas=(0.1, 0.1), eps=1.0))
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    apply_update(update, other)
    for group in other.param_groups:
        assert {k: group[k] for k in ("lr", "weight_decay", "betas", "eps", "step")} == {
            "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-8, "step": 1,
        }  # fmt: skip


def test_gradients_are_applied_by_the_same_function() -> None:
    live, late = _optimizer(RULES["momentum"]), _optimizer(RULES["momentum"])
    basis = Dense([p.numel() for p in live.parameters])
    update = combine(_answers(3, basis), live)
    live.record(update.coefficients, basis)
    live.step()
    apply_update(update, late)
    _assert_same(late, live)


def test_the_record_says_who_and_how() -> None:
    optimizer = _optimizer(RULES["adamw"])
    answers = _answers(9, optimizer.basis(9))
    update = combine(answers, optimizer, Median(), mu=0.25)
    encode(update)  # which checks it
    assert (update.round, update.step, update.mu) == (9, 1, 0.25)
    assert update.participants == [1, 4, 5]
    assert update.weights == [3 / 16, 6 / 16, 7 / 16]
    assert update.rule == {"name": "AdamW", "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.95), "eps": 1e-8}
    values = torch.stack([a.coefficients for a in answers])
    assert torch.equal(update.coefficients, values.median(dim=0).values)


def test_a_long_record_of_our_own_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _optimizer(RULES["sgd"])
    frame = encode(combine(_answers(0, Dense([10_000])), optimizer))
    monkeypatch.setattr(Frames.decode, "__kwdefaults__", {**Frames.decode.__kwdefaults__, "limit": 30_000})
    monkeypatch.setattr(aggregation.update, "LIMIT", 30_000)
    with pytest.raises(TooLargeError):
        decode(frame)
    assert len(recorded(frame, bytes(16)).coefficients) == 10_000
    with pytest.raises(AddressError):
        recorded(frame, bytes(range(16)))


def test_the_order_of_arrival_does_not_matter() -> None:
    optimizer = _optimizer(RULES["sgd"])
    answers = _answers(0, optimizer.basis(0))
    first, second = combine(answers, optimizer), combine(answers[::-1], optimizer)
    assert torch.equal(first.coefficients, second.coefficients)
    assert first.participants == second.participants == [1, 4, 5]
    assert first.weights == second.weights


SHARED: dict[str, Any] = {"kind": "shared_directions", "probes": 3, "distribution": "rademacher"}
SGD_RULE: dict[str, Any] = {"name": "SGD", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}


@pytest.fixture
def update() -> Update:
    return next(iter(_live(_optimizer(RULES["sgd"]), SCHEDULES["constant"])))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"step": 4}, r"update of round 10 is step 4, the client has taken 0: apply the 3 missing before it, in order"),
        ({"step": 0}, "is step 0, the client has taken 0: it was applied already"),
        ({"rule": {"name": "AdamW", "lr": 0.1}}, "is for the rule AdamW, the client's optimizer is SGD"),
        ({"rule": {"name": "SGD", "lr": 0.1}}, r"has the settings \['lr'\] of SGD, not \['lr', 'momentum', 'weight_d"),
        ({"basis": {"kind": "moons"}}, "no basis is described by {'kind': 'moons'}"),
        ({"coefficients": torch.ones(5)}, r"\(3,\), got \(5,\)"),
        ({"basis": SHARED | {"probes": "3"}}, "basis.probes must be of type int, got '3'"),
        ({"basis": SHARED | {"probes": 3.0}}, "basis.probes must be of type int, got 3.0"),
        ({"basis": SHARED | {"distribution": ["gauss16"]}}, r"basis.distribution must be of type str, got \['gauss16'"),
        ({"rule": SGD_RULE | {"lr": "x"}}, "the update of round 10 has lr = 'x'; SGD needs one like 5.0"),
        ({"rule": SGD_RULE | {"lr": True}}, "has lr = True; SGD needs one like 5.0"),
        ({"rule": SGD_RULE | {"lr": math.nan}}, "has lr = nan; SGD needs one like 5.0"),
        ({"rule": SGD_RULE | {"lr": [0.1]}}, r"has lr = \(0.1,\); SGD needs one like 5.0"),
        ({"rule": SGD_RULE | {"lr": -1.0}}, "the update of round 10: SGD: lr must be >= 0, got -1.0"),
        ({"rule": SGD_RULE | {"momentum": 1.0}}, r"SGD: momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_and_changes_nothing(
    update: Update, change: dict[str, Any], match: str
) -> None:
    client = _optimizer(SGD(lr=5.0))
    with pytest.raises(ValueError, match=match):
        apply_update(replace(update, **change), client)
    _assert_same(client, _optimizer(SGD(lr=5.0)))
    assert (client.steps, client.param_groups[0]["lr"]) == (0, 5.0)
    apply_update(update, client)


@pytest.mark.parametrize("betas", [0.9, [0.9], [0.9, "x"], [0.9, 1.5]])
def test_moments_of_another_form_are_refused(betas: Any) -> None:
    client = _optimizer(RULES["adamw"])
    record = next(iter(_live(_optimizer(RULES["adamw"]), SCHEDULES["constant"])))
    with pytest.raises(UpdateError, match="betas"):
        apply_update(replace(record, rule=record.rule | {"betas": betas}), client)
    assert client.steps == 0


def test_there_is_one_default_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a plain Trainer, where nobody can name another."""
    in_a_trainer: list[AggregationRule] = []

    def noted(*args: Any, **kwargs: Any) -> Update:
        call = inspect.signature(combine).bind(*args, **kwargs)
        call.apply_defaults()
        in_a_trainer.append(call.arguments["rule"])
        return combine(*args, **kwargs)

    monkeypatch.setattr(hybrid_order, "combine", noted)
    fit(mlp(), hybrid(), max_steps=1)
    default = inspect.signature(combine).parameters["rule"].default
    assert [rule is MEAN for rule in [default, *in_a_trainer, HOSFL().aggregation]] == [True] * 3


def test_an_update_applied_twice_is_refused(update: Update) -> None:
    client = _optimizer(RULES["sgd"])
    apply_update(update, client)
    with pytest.raises(UpdateError, match="is step 1, the client has taken 1: it was applied already"):
        apply_update(update, client)
