from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hosfl_lightning.optim import SGD, AdamW, Basis, Dense, SharedDirections, UpdateRule, ZerothOrder, basis, rule_of
from hosfl_lightning.wire import StepRequest, decode, encode

SHAPES = [(13, 7), (5,), (), (41, 3)]
Reference = Callable[[Any], torch.optim.Optimizer]
RULES: dict[str, tuple[UpdateRule, Reference]] = {
    "sgd": (SGD(lr=0.1), partial(torch.optim.SGD, lr=0.1)),
    "sgd, decay": (SGD(lr=0.1, weight_decay=0.05), partial(torch.optim.SGD, lr=0.1, weight_decay=0.05)),
    "momentum": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.05),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    ),
    "adamw": (AdamW(lr=0.01), partial(torch.optim.AdamW, lr=0.01)),
    "adamw, no decay": (AdamW(lr=0.01, weight_decay=0.0), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)),
    "adamw, betas": (
        AdamW(lr=0.03, betas=(0.8, 0.95), eps=1e-3),
        partial(torch.optim.AdamW, lr=0.03, betas=(0.8, 0.95), eps=1e-3),
    ),
}
STATEFUL = ["momentum", "adamw"]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_parameters(dtype: torch.dtype = torch.float32, shapes: list[Any] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(shape, generator=generator) for shape in SHAPES]


def dense_step(optimizer: ZerothOrder, gradient: list[Tensor]) -> None:
    dense = Dense([g.numel() for g in gradient])
    optimizer.record(dense.project(gradient), dense)
    optimizer.step()


def assert_same_bits(actual: list[Any], expected: list[Any]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
        assert torch.equal(a.detach().view(integers), e.detach().view(integers))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_torch_optim_up_to_rounding(name: str) -> None:
    rule, make_reference = RULES[name]
    ours, theirs = make_parameters(), make_parameters()
    optimizer, reference = ZerothOrder(ours, rule), make_reference(theirs)
    schedulers = [LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, reference)]
    for gradient in gradients(10):
        dense_step(optimizer, gradient)
        for parameter, g in zip(theirs, gradient):
            parameter.grad = g
        reference.step()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"] == pytest.approx(rule.lr / 11)
    for one, other in zip(ours, theirs):  # torch contracts to fused multiply-adds
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def three_steps(rule: UpdateRule, shapes: list[Any], gradient: Basis, coefficients: Tensor) -> list[nn.Parameter]:
    parameters = make_parameters(shapes=shapes)
    optimizer = ZerothOrder(parameters, rule)
    for step in range(3):
        optimizer.record(coefficients / (step + 1), gradient)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("rule", [RULES[name][0] for name in STATEFUL], ids=STATEFUL)
@pytest.mark.parametrize("distribution", ["rademacher", "gauss16"])
@pytest.mark.parametrize(("chunk", "small"), [(1, 0), (7, 0), (60, 10), (150, 100)])
def test_the_chunk_size_does_not_matter(
    rule: UpdateRule, distribution: str, chunk: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directions = SharedDirections(3, 1, 2, distribution)
    coefficients = torch.tensor([0.7, -1.3])
    whole = three_steps(rule, SHAPES, directions, coefficients)
    monkeypatch.setattr(basis, "CHUNK", chunk)
    monkeypatch.setattr(basis, "SMALL", small)
    assert len(basis.buckets([p.numel() for p in whole])) > 1
    assert_same_bits(three_steps(rule, SHAPES, directions, coefficients), whole)


@pytest.mark.parametrize("rule", [RULES[name][0] for name in STATEFUL], ids=STATEFUL)
def test_the_number_of_threads_does_not_matter(rule: UpdateRule, restored_threads: None) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(three_steps(rule, [(300, 501), (70001,)], SharedDirections(3, 1, 2), torch.tensor([0.7, -1.3])))
    assert_same_bits(*results)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_bf16_parameter_is_updated_in_fp32_and_cast_once(name: str) -> None:
    rule, make_reference = RULES[name]
    narrow = make_parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    optimizer, reference = ZerothOrder(narrow, rule), make_reference(wide)
    for gradient in gradients(3):
        dense_step(optimizer, gradient)
        for parameter, g in zip(wide, gradient):
            parameter.grad = g
        reference.step()
        for parameter in wide:
            parameter.data = parameter.data.bfloat16().float()
    assert_same_bits(narrow, [p.bfloat16() for p in wide])


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("rule", [RULES[name][0] for name in STATEFUL], ids=STATEFUL)
def test_moments_of_a_bf16_parameter_stay_fp32_in_a_checkpoint(rule: UpdateRule) -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = ZerothOrder(parameters, rule)
    first, second = list(gradients(2))
    dense_step(optimizer, first)
    saved = through_a_file(optimizer.state_dict())
    resumed_parameters = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = ZerothOrder(resumed_parameters, rule)
    resumed.load_state_dict(saved)

    slots = rule.slots(rule.hyper_parameters())
    for old, new in zip(parameters, resumed_parameters):
        assert_same_bits([resumed.state[new][s] for s in slots], [optimizer.state[old][s] for s in slots])
        assert all(resumed.state[new][s].dtype == torch.float32 for s in slots)
    dense_step(optimizer, second)
    dense_step(resumed, second)
    assert_same_bits(resumed_parameters, parameters)


def test_a_loaded_state_is_a_copy() -> None:
    parameters = make_parameters()
    optimizer = ZerothOrder(parameters, AdamW())
    first, second = list(gradients(2))
    dense_step(optimizer, first)
    saved = optimizer.state_dict()
    resumed = ZerothOrder(make_parameters(), AdamW())
    resumed.load_state_dict(saved)
    before = saved["state"][0]["exp_avg"].clone()
    dense_step(resumed, second)
    assert torch.equal(saved["state"][0]["exp_avg"], before)


def test_plain_sgd_keeps_no_state_and_a_group_may_differ() -> None:
    still, moving = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = ZerothOrder([{"params": [still]}, {"params": [moving], "momentum": 0.5}], SGD(lr=1.0))
    for _ in range(2):
        dense_step(optimizer, [torch.ones(3), torch.ones(3)])
    assert list(optimizer.state) == [moving]
    assert torch.equal(still, torch.full((3,), -2.0))
    assert torch.equal(moving, torch.full((3,), -2.5))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SGD(lr=-1.0), "lr"),
        (lambda: AdamW(lr=float("nan")), "lr"),
        (lambda: AdamW(weight_decay=-0.1), "weight_decay"),
        (lambda: SGD(momentum=1.0), "momentum"),
        (lambda: AdamW(betas=(0.9, 1.0)), "betas"),
    ],
)
def test_a_setting_out_of_range_is_named(make: Callable[[], UpdateRule], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def sent(rule: dict[str, Any]) -> dict[str, Any]:
    """As it arrives in a message."""
    received = decode(encode(StepRequest(0, 0, rule=rule)))
    assert isinstance(received, StepRequest)
    return received.rule


class Clipped(SGD):
    """A rule of somebody's own, below one of the package's; with a setting more."""

    def __init__(self, limit: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        object.__setattr__(self, "limit", limit)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_made_of_what_a_message_says_of_it(name: str) -> None:
    rule = RULES[name][0]
    optimizer = ZerothOrder(make_parameters(), rule)
    for description in (optimizer.prescription, sent(optimizer.prescription)):
        made = rule_of(description)
        assert type(made) is type(rule)
        assert made == rule
    optimizer.param_groups[0]["lr"] = 0.25  # as a scheduler does
    assert rule_of(sent(optimizer.prescription)).lr == 0.25


def test_a_rule_of_ones_own_is_known_once_its_class_is() -> None:
    made = rule_of({"name": "Clipped", "lr": 0.1, "limit": 3.0})
    assert isinstance(made, Clipped)
    assert (made.lr, vars(made)["limit"]) == (0.1, 3.0)


@pytest.mark.parametrize(
    ("description", "match"),
    [
        ({"name": "Adagrad", "lr": 0.1}, "no update rule 'Adagrad' is known here, only AdamW, .*SGD; import its class"),
        ({"lr": 0.1}, "no update rule None is known here"),
        ({}, "no update rule None is known here"),
        ({"name": ["SGD"], "lr": 0.1}, r"no update rule \['SGD'\] is known here"),
        ({"name": "UpdateRule", "lr": 0.1}, "no update rule 'UpdateRule' is known here"),
        ({"name": "SGD", "lr": 0.1, "nesterov": True}, "update rule SGD: .*'nesterov'"),
        ({"name": "SGD", "lr": "x"}, "update rule SGD: .*'str'"),
        ({"name": "SGD", "lr": -1.0}, "SGD: lr must be >= 0, got -1.0"),
        ({"name": "AdamW", "betas": 0.9}, "update rule AdamW: .*'float'"),
        ({"name": "AdamW", "betas": [0.9, 1.0]}, "AdamW: betas must be in"),
    ],
)
def test_a_description_of_no_rule_is_refused(description: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rule_of(description)
