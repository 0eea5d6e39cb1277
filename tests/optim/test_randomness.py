from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import ESTIMATORS, SGD, ZerothOrder
from hosfl_lightning.optim.randomness import SameRandomness
from hosfl_lightning.optim.submodules import submodules

X = torch.linspace(-1, 1, 48).view(6, 8)


class Net(nn.Module):
    """Dropout and running statistics; keeps the masks it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(self.dropout(torch.ones(6, 8)) != 0)
        return self.norm(self.linear(x)) * self.masks[-1]

    def statistics(self) -> list[Tensor]:
        return [b.clone() for b in self.buffers()]


def make() -> Net:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return Net()


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize(
    ("estimator", "layerwise"), [*((e, True) for e in ESTIMATORS), ("forward", False), ("central", False)]
)
def test_masks_are_those_of_the_forward_at_theta(estimator: str, layerwise: bool) -> None:
    net = make()
    zo = ZerothOrder(net.parameters(), module=net if layerwise else None, probes=3, mu=0.1, estimator=estimator)
    zo.step(lambda: net(X).square().mean())
    zo.step(lambda: net(X).square().mean())
    first, second = net.masks[: len(net.masks) // 2], net.masks[len(net.masks) // 2 :]
    assert len(first) == {"forward": 4, "central": 7 if layerwise else 6, "jvp": 4}[estimator]
    for masks in (first, second):
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_leaves_statistics_and_random_state_as_one_forward_does(estimator: str) -> None:
    net, twin = make(), make()
    with torch.no_grad():
        twin(X)
    expected = torch.rand(3)
    torch.manual_seed(11)
    zo = ZerothOrder(net.parameters(), SGD(lr=0.1), module=net, probes=3, mu=0.1, estimator=estimator)
    zo.step(lambda: net(X).square().mean())
    assert torch.equal(torch.rand(3), expected)
    assert all_equal(net.statistics(), twin.statistics())
    assert net.training
    assert not all_equal(net.statistics(), make().statistics())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fails", [False, True])
def test_projecting_leaves_statistics_and_random_state_alone(estimator: str, fails: bool) -> None:
    net = make()
    zo = ZerothOrder(net.parameters(), module=net, probes=3, mu=0.1, estimator=estimator)
    state, statistics = torch.random.get_rng_state(), net.statistics()

    def objective() -> Tensor:
        loss = net(X).square().mean()
        if fails and len(net.masks) == 3:
            raise RuntimeError("midway")
        return loss

    if fails:
        with pytest.raises(RuntimeError, match="midway"):
            zo.project(objective)
    else:
        zo.project(objective)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all_equal(net.statistics(), statistics)


def test_a_step_from_recorded_values_leaves_the_random_state_alone() -> None:
    net = make()
    zo = ZerothOrder(net.parameters(), module=net, probes=2)
    state = torch.random.get_rng_state()
    zo.record(torch.ones(2))
    zo.step()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_module_statistics_are_not_protected_but_masks_are() -> None:
    net = make()
    ZerothOrder(net.parameters(), probes=2).project(lambda: net(X).mean())
    assert net.norm.num_batches_tracked == torch.tensor(3)
    assert all(torch.equal(mask, net.masks[0]) for mask in net.masks)


def test_norms_in_eval_mode_are_not_copied() -> None:
    net = make()
    assert SameRandomness(net, torch.device("cpu")).norms == [net.norm]
    assert SameRandomness(net.eval(), torch.device("cpu")).norms == []


def test_every_call_starts_from_the_state_at_construction() -> None:
    same = SameRandomness(None, torch.device("cpu"))
    expected = torch.rand(2)
    after = torch.random.get_rng_state()
    torch.manual_seed(99)
    torch.random.set_rng_state(after)
    for _ in range(2):
        assert torch.equal(same(lambda: torch.rand(2)), expected)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_submodules_are_those_of_torch_each_once() -> None:
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), nn.ModuleDict({"a": nn.BatchNorm1d(2)}))
    net.register_module("none", None)
    found = submodules(net)
    assert len(found) == len(set(found)) == 6
    assert set(found) == set(net.modules())
