from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hosfl_lightning.optim import ESTIMATORS, SGD, AdamW, Dense, UpdateRule, ZerothOrder
from hosfl_lightning.rng import DISTRIBUTIONS, direction, round_coefficient


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.x = torch.randn(32, 4, generator=generator)
        self.y = self.x[:, :1] - 0.5 * self.x[:, 1:2]

    def loss(self) -> Tensor:
        return (self.net(self.x) - self.y).square().mean()


def weights_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rule", [SGD(lr=0.05), AdamW(lr=0.03)], ids=["sgd", "adamw"])
def test_it_descends(estimator: str, distribution: str, rule: UpdateRule) -> None:
    model = Regression()
    zo = ZerothOrder(
        model.parameters(), rule, module=model.net, probes=8, estimator=estimator, distribution=distribution
    )
    before = model.loss().item()
    for _ in range(40):
        zo.step(model.loss)
    assert zo.steps == 40
    assert model.loss().item() < before / 2


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_step_is_project_then_record_then_step(layerwise: bool) -> None:
    models = [Regression(), Regression()]
    optimizers = [
        ZerothOrder(m.parameters(), AdamW(lr=0.02), module=m.net if layerwise else None, probes=3) for m in models
    ]
    for _ in range(3):
        expected = models[0].loss()
        assert torch.equal(optimizers[0].step(models[0].loss), expected)
        optimizers[1].record(optimizers[1].project(models[1].loss))
        assert optimizers[1].step() is None
    assert_equal(weights_of(models[0]), weights_of(models[1]))


def test_recorded_values_win_over_the_closure_which_is_called_once() -> None:
    model, calls = Regression(), []
    zo = ZerothOrder(model.parameters(), SGD(lr=1.0), probes=2)
    before = weights_of(model)
    zo.record(torch.zeros(2))
    zo.step(lambda: calls.append(1))
    assert calls == [1]
    assert_equal(weights_of(model), before)
    zo.step(model.loss)  # what was recorded is used up
    assert not torch.equal(weights_of(model)[0], before[0])


def test_steps_have_different_directions_and_seeds_too() -> None:
    updates = []
    for seed, step in [(0, 0), (0, 1), (1, 0)]:
        parameter = nn.Parameter(torch.zeros(64))
        zo = ZerothOrder([parameter], SGD(lr=1.0), probes=1, seed=seed)
        for _ in range(step):
            zo.record(torch.zeros(1))
            zo.step()
        zo.record(torch.ones(1))
        zo.step()
        updates.append(parameter.detach())
    assert (torch.stack(updates) @ torch.stack(updates).T / 64 - torch.eye(3)).abs().max() < 0.5


def test_groups_have_learning_rates_of_their_own_and_one_numbering() -> None:
    first, second, third = (nn.Parameter(torch.zeros(6)) for _ in range(3))
    zo = ZerothOrder([{"params": [first, second]}, {"params": [third], "lr": 0.25}], SGD(lr=1.0), probes=1)
    assert zo.parameters == [first, second, third]
    zo.record(torch.ones(1))
    zo.step()
    expected = [torch.zeros(6) for _ in range(3)]
    zo.basis(0).apply(expected, torch.ones(1), -1.0)
    assert_equal([first, second, third * 4], expected)
    assert [g["step"] for g in zo.param_groups] == [1, 1]


def test_a_scheduler_moves_the_learning_rate() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    zo = ZerothOrder([parameter], SGD(lr=1.0))
    scheduler = LambdaLR(zo, lambda step: 0.5**step)
    for _ in range(3):
        zo.record(torch.ones(1), Dense([1]))
        zo.step()
        scheduler.step()
    assert parameter.item() == -1.75


def test_named_parameters_are_numbered_in_their_order() -> None:
    models = [Regression(), Regression()]
    zo, named = ZerothOrder(models[0].parameters()), ZerothOrder(models[1].named_parameters())
    assert named.param_groups[0]["param_names"] == [name for name, _ in models[1].named_parameters()]
    assert torch.equal(zo.project(models[0].loss), named.project(models[1].loss))


@pytest.mark.parametrize("rule", [SGD(lr=0.05), SGD(lr=0.05, momentum=0.9), AdamW(lr=0.02)], ids=str)
def test_resumed_is_never_stopped(rule: UpdateRule) -> None:
    def make(seed: int) -> tuple[Regression, ZerothOrder, LambdaLR]:
        model = Regression()
        zo = ZerothOrder(model.parameters(), rule, module=model, probes=2, seed=seed, distribution="gauss16")
        return model, zo, LambdaLR(zo, lambda step: 1 / (1 + step))

    def train(model: Regression, zo: ZerothOrder, scheduler: LambdaLR) -> None:
        for _ in range(3):
            zo.step(model.loss)
            scheduler.step()

    straight, stopped, resumed = make(7), make(7), make(8)
    train(*straight)
    train(*straight)
    train(*stopped)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], buffer)
    buffer.seek(0)
    parts: tuple[Any, ...] = resumed
    for part, state in zip(parts, torch.load(buffer, weights_only=True)):
        part.load_state_dict(state)
    assert resumed[1].steps == 3
    train(*resumed)
    assert_equal(weights_of(resumed[0]), weights_of(straight[0]))


def test_a_loaded_state_decides_the_directions_and_moments() -> None:
    saved = ZerothOrder([nn.Parameter(torch.zeros(3))], SGD(momentum=0.9), probes=5, seed=3, mu=0.5).state_dict()
    zo = ZerothOrder([nn.Parameter(torch.zeros(3))], SGD(), probes=2)
    zo.load_state_dict(saved)
    assert (zo.basis(0).size, zo.basis(0).streams[0].seed, zo.mu) == (5, 3, 0.5)
    zo.record(torch.ones(5))
    zo.step()
    assert zo.state[zo.parameters[0]].keys() == {"momentum_buffer"}


@pytest.mark.parametrize("estimator", ["forward", "central"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mu_is_rounded_once_and_is_the_length_of_a_probe(estimator: str, distribution: str) -> None:
    parameter = nn.Parameter(torch.zeros(9))
    zo = ZerothOrder([parameter], probes=1, mu=0.1, estimator=estimator, distribution=distribution)
    assert zo.mu == round_coefficient(0.1, DISTRIBUTIONS[distribution]) == pytest.approx(0.1, rel=2**-16)
    seen: list[Tensor] = []

    def look() -> Tensor:
        seen.append(parameter.detach().clone())
        return torch.zeros(())

    zo.project(look)
    mu_u = zo.mu * direction(zo.basis(0).streams[0], 0, 0, 9)
    assert_equal(seen, {"forward": [torch.zeros(9), mu_u], "central": [mu_u, -mu_u]}[estimator])


def test_only_differences_have_a_smoothing_length() -> None:
    model = Regression()
    zo = {e: ZerothOrder(model.parameters(), module=model, mu=0.1, estimator=e) for e in ESTIMATORS}
    assert [zo[e].smoothing for e in ("forward", "central", "jvp")] == [zo["forward"].mu, zo["central"].mu, None]
    zo["forward"].probed = {1}
    zo["central"].probed = set()
    assert [zo[e].smoothing for e in ("forward", "central")] == [zo["forward"].mu, None]


def test_hooks_of_torch_are_called_once_a_step() -> None:
    model, seen = Regression(), []
    zo = ZerothOrder(model.parameters(), probes=4)
    zo.register_step_pre_hook(lambda *_: seen.append("before"))
    zo.register_step_post_hook(lambda *_: seen.append("after"))
    zo.step(model.loss)
    assert seen == ["before", "after"]


def test_after_a_step_autocast_casts_again_and_with_a_graph() -> None:
    linear, x = nn.Linear(8, 1), torch.ones(2, 8)
    zo = ZerothOrder(linear.parameters(), SGD(lr=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        zo.record(torch.ones(2))
        before = zo.step(lambda: linear(x).sum())
        after = linear(x).sum()
    assert not torch.equal(before, after)
    after.backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "probes must be between 1 and 4096, got 0"),
        ({"probes": 5000}, "probes must be between 1 and 4096, got 5000"),
        ({"mu": 0.0}, "mu must be > 0"),
        ({"mu": -1e-3}, "mu must be > 0"),
        ({"mu": 1e-60}, "mu must be > 0"),
        ({"mu": float("inf")}, "finite"),
        ({"mu": float("nan")}, "finite"),
        ({"estimator": "backward"}, "estimator must be one of forward, central, jvp, or .* got 'backward'"),
        ({"distribution": "cauchy"}, "distribution must be one of rademacher, gauss16, got 'cauchy'"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"module": nn.Linear(1, 1)}, "not in module="),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerothOrder(nn.Linear(2, 2).parameters(), **settings)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.zeros(3, 4).T, "contiguous"), (torch.zeros(3, dtype=torch.float64), "float64")],
)
def test_a_parameter_it_cannot_move_is_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerothOrder([nn.Parameter(tensor)])
    zo = ZerothOrder([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=message):
        zo.add_param_group({"params": [nn.Parameter(tensor)]})


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_a_step_with_nothing_to_apply_is_refused(closure: Callable[[], None] | None) -> None:
    zo = ZerothOrder([nn.Parameter(torch.zeros(1))])
    with pytest.raises(RuntimeError, match=r"nothing to apply: pass a closure.*or record\(\)"):
        zo.step(closure)
    assert zo.steps == 0


def test_coefficients_of_another_shape_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    zo = ZerothOrder([parameter], probes=3)
    for wrong in (torch.ones(2), torch.ones(3, 4), torch.ones(1)):
        with pytest.raises(ValueError, match=r"one coefficient per direction, \(3,\), got"):
            zo.record(wrong)
    with pytest.raises(ValueError, match="a loss must be a scalar"):
        zo.step(lambda: parameter * 2)
    assert zo.steps == 0
    assert torch.equal(parameter, torch.zeros(2))
