"""One property suite for every estimator and distribution; what differs between estimators is in two small tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.aggregation import weighted_mean, weights
from hosfl_lightning.clients import lagrangian_term
from hosfl_lightning.optim import ESTIMATORS, SGD, SharedDirections, ZerothOrder
from hosfl_lightning.optim.local_gradient import add_local_gradient_
from hosfl_lightning.rng import DISTRIBUTIONS
from hosfl_lightning.split.side import Bottleneck

EVALUATIONS: dict[str, Callable[[int], int]] = {
    "forward": lambda p: p + 1, "central": lambda p: 2 * p, "jvp": lambda p: p,
}  # fmt: skip
# v − ⟨g, u⟩ on a quadratic with Hessian A.
ERROR: dict[str, Callable[[float, Tensor], Any]] = {
    "forward": lambda mu, u_a_u: mu / 2 * u_a_u,
    "central": lambda *_: 0,
    "jvp": lambda *_: 0,
}

pytestmark = [pytest.mark.parametrize("estimator", ESTIMATORS), pytest.mark.parametrize("distribution", DISTRIBUTIONS)]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Quadratic(nn.Module):
    """f(θ) = ½ Σ a θ² + Σ b θ in fp64, over two tensors, and its derivatives."""

    def __init__(self, size: int = 60) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(normal(size - 7, seed=1)), nn.Parameter(normal(7, 1, seed=2))
        self.a = normal(size, seed=3).double().square() + 0.5
        self.b = normal(size, seed=4).double()
        self.evaluations = 0

    @property
    def theta(self) -> Tensor:
        return torch.cat([self.first, self.second.view(-1)]).double()

    @property
    def gradient(self) -> Tensor:
        return self.a * self.theta.detach() + self.b

    def forward(self) -> Tensor:
        self.evaluations += 1
        return (self.a / 2 * self.theta.square() + self.b * self.theta).sum()


def directions(optimizer: ZerothOrder) -> Tensor:
    basis = optimizer.basis(optimizer.steps)
    rows = []
    for probe in range(basis.size):
        tensors = [torch.zeros_like(p) for p in optimizer.parameters]
        basis.apply(tensors, torch.eye(basis.size)[probe] * basis.size, 1.0)
        rows.append(torch.cat([t.view(-1) for t in tensors]).double())
    return torch.stack(rows)


def step_of(optimizer: ZerothOrder, coefficients: Tensor) -> Tensor:
    """ĝ, read off a step of plain SGD with learning rate 1 from zero."""
    tensors = [torch.zeros_like(p) for p in optimizer.parameters]
    optimizer.basis(optimizer.steps).apply(tensors, coefficients.float(), 1.0)
    return torch.cat([t.view(-1) for t in tensors]).double()


@pytest.mark.parametrize("mu", [0.25, 1e-3])
def test_a_quadratic_gives_the_known_value(estimator: str, distribution: str, mu: float) -> None:
    f = Quadratic()
    zo = ZerothOrder(f.parameters(), module=f, probes=5, mu=mu, estimator=estimator, distribution=distribution)
    u = directions(zo)
    expected = u @ f.gradient + ERROR[estimator](zo.mu, (u * f.a * u).sum(1))
    torch.testing.assert_close(zo.project(f), expected, rtol=1e-4, atol=1e-4 + 1e-6 / mu)


@pytest.mark.parametrize("probes", [1, 4])
def test_the_number_of_evaluations(estimator: str, distribution: str, probes: int) -> None:
    f = Quadratic()
    zo = ZerothOrder(f.parameters(), module=f, probes=probes, estimator=estimator, distribution=distribution)
    v = zo.project(f)
    assert f.evaluations == EVALUATIONS[estimator](probes)
    assert v.shape == (probes,)
    assert v.dtype == torch.float64
    assert zo.project(lambda: f().float()).dtype == torch.float64
    base = f()
    f.evaluations = 0
    assert torch.equal(zo.project(f, base=base), v)
    assert f.evaluations == {"forward": probes, "central": 2 * probes, "jvp": probes}[estimator]


def test_the_estimate_is_unbiased(estimator: str, distribution: str) -> None:
    f, probes = Quadratic(20), 400
    zo = ZerothOrder(f.parameters(), module=f, probes=probes, mu=1e-2, estimator=estimator, distribution=distribution)
    v, g = zo.project(f), f.gradient
    # v u has variance ‖g‖² + (E u⁴ − 2) g²; the forward difference's even error is orthogonal to u and adds its square.
    fourth = {"rademacher": 1, "gauss16": 3}[distribution]
    error = ERROR[estimator](zo.mu, f.a.sum())
    deviation = ((g.square().sum() + (fourth - 2) * g.square() + error**2) / probes).sqrt()
    z = (step_of(zo, v) - g) / deviation
    assert z.abs().max() < 4
    assert 0.3 < z.square().mean() < 2


def test_the_cosine_grows_like_the_root_of_the_number_of_probes(estimator: str, distribution: str) -> None:
    f, seeds = Quadratic(200), 5
    for probes in (4, 64):
        cosines = []
        for seed in range(seeds):
            zo = ZerothOrder(
                f.parameters(), module=f, probes=probes, mu=1e-3, estimator=estimator, distribution=distribution,
                seed=seed,
            )  # fmt: skip
            cosines.append(torch.cosine_similarity(step_of(zo, zo.project(f)), f.gradient, dim=0))
        expected = (probes / (probes + 200)) ** 0.5
        assert abs(torch.stack(cosines).mean() - expected) < 4 * (200 * seeds) ** -0.5


class Clients(nn.Module):
    """Mean squared errors of one linear model on the batches of K clients, in fp64."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(6, seed=5))
        self.sizes = sizes
        self.x, self.y = normal(sum(sizes), 6, seed=6).double(), normal(sum(sizes), seed=7).double()

    def forward(self) -> Tensor:
        """Of every example."""
        return (self.x @ self.weight.double() - self.y).square()

    def each(self) -> Tensor:
        return torch.stack([part.mean() for part in self().split(self.sizes)])

    def of(self, k: int) -> Tensor:
        return self.each()[k]

    def together(self) -> Tensor:
        return self().mean()


def test_an_objective_of_many_clients_gives_one_column_each(estimator: str, distribution: str) -> None:
    clients = Clients([2, 3, 4])
    zo = ZerothOrder([clients.weight], module=clients, probes=5, estimator=estimator, distribution=distribution)
    v = zo.project(clients.each)
    assert v.shape == (5, 3)
    for k in range(3):
        assert torch.equal(v[:, k], zo.project(partial(clients.of, k)))


def test_copies_of_a_client_give_its_update(estimator: str, distribution: str) -> None:
    client = Clients([4])
    zo = ZerothOrder(
        [client.weight], SGD(lr=0.1), module=client, probes=3, estimator=estimator, distribution=distribution
    )
    alone = zo.project(client.each).T.float()
    copies = zo.project(lambda: client.each().repeat(3)).T.float()
    assert copies.shape == (3, 3)
    mean = weighted_mean(copies, weights([4, 4, 4]))
    before = client.weight.detach().clone()
    updated = []
    for coefficients in (alone[0], mean):
        client.weight.data.copy_(before)
        zo.param_groups[0]["step"] = 0
        zo.record(coefficients)
        zo.step()
        updated.append(client.weight.detach().clone())
    assert torch.equal(*updated)
    assert not torch.equal(updated[0], before)


def test_unequal_clients_give_the_coefficients_of_the_joined_batch(estimator: str, distribution: str) -> None:
    clients = Clients([1, 3, 8])
    zo = ZerothOrder([clients.weight], module=clients, probes=4, estimator=estimator, distribution=distribution)
    mean = weighted_mean(zo.project(clients.each).T, weights(clients.sizes))
    torch.testing.assert_close(mean, zo.project(clients.together).float(), rtol=1e-6, atol=1e-9)
    unweighted = zo.project(clients.each).mean(1).float()
    assert not torch.allclose(unweighted, mean, rtol=1e-2)


class LowPrecision(nn.Module):
    """A bf16 backbone with an fp32 adapter: z = cast(x W + x A)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(32, 32, dtype=torch.bfloat16)
        self.adapter = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            self.backbone.weight.copy_(normal(32, 32, seed=1) / 6)
            self.backbone.bias.zero_()
            self.adapter.weight.copy_(normal(32, 32, seed=2) / 60)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x) + self.adapter(x.float()).bfloat16()


def test_sums_in_fp64_keep_the_signal_in_bf16(estimator: str, distribution: str) -> None:
    model = LowPrecision().requires_grad_(False)
    x = normal(4, 16, 32, seed=3).bfloat16()
    # A multiplier that is correlated with z, as a loss that shrinks activations gives: the sum is large.
    multiplier = model(x) + normal(4, 16, 32, seed=4).bfloat16()
    zo = ZerothOrder(
        [model.adapter.weight], module=model, probes=12, mu=4e-3, estimator=estimator, distribution=distribution
    )
    gradient = torch.einsum("bsi,bsj->ij", multiplier.double(), x.double())
    truth = directions(zo) @ gradient.view(-1)

    v = zo.project(lambda: lagrangian_term(model(x), multiplier, [slice(0, 4)]))[:, 0]
    assert _relative_error(v, truth) < 0.15
    sums = zo.project(lambda: (model(x) * multiplier).sum())
    assert (_relative_error(sums, truth) > 0.5) == (estimator != "jvp"), "which takes no difference"


def _relative_error(v: Tensor, truth: Tensor) -> float:
    return float((v - truth).norm() / truth.norm())


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(70001, seed=8))

    def forward(self) -> Tensor:
        return self.weight[-10000:].tanh().sum()


def test_the_number_of_threads_does_not_matter(estimator: str, distribution: str, restored_threads: None) -> None:
    values, updated = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        large = Tail()
        zo = ZerothOrder(
            large.parameters(), SGD(lr=1.0), module=large, probes=2, estimator=estimator, distribution=distribution
        )
        values.append(zo.project(large))
        zo.record(values[-1])
        zo.step()
        updated.append(large.weight.detach())
    assert torch.equal(*values)
    assert torch.equal(*updated)


def test_parameters_have_their_bits_again(estimator: str, distribution: str) -> None:
    f = Quadratic()
    found, bits = [*f.parameters()], [p.detach().clone() for p in f.parameters()]
    ZerothOrder(found, module=f, probes=3, mu=0.1, estimator=estimator, distribution=distribution).project(f)
    assert all(p is before for p, before in zip(f.parameters(), found, strict=True))
    assert all(torch.equal(p, before) for p, before in zip(f.parameters(), bits))


def test_another_basis_than_that_of_the_next_step(estimator: str, distribution: str) -> None:
    f = Quadratic()
    zo = ZerothOrder(f.parameters(), module=f, probes=2, mu=0.1, estimator=estimator, distribution=distribution, seed=4)
    other = SharedDirections(4, 7, 3, distribution)
    v = zo.project(f, basis=other)
    zo.param_groups[0].update(step=7, probes=3)
    assert torch.equal(v, zo.project(f))


#: Of the estimators, beside the exact projections: μ as it is used in fp32, and what its bias and rounding may be.
LOCAL = {"forward": (2**-12, 2e-3), "central": (2**-7, 5e-4), "jvp": (1.0, 2e-6)}


def test_all_converge_to_the_projections_of_the_exact_local_gradient(estimator: str, distribution: str) -> None:
    adapter = Bottleneck((12, 8), (12, 8), 4)
    adapter.down.weight.data, adapter.up.weight.data = normal(4, 8, seed=1), normal(8, 4, seed=2)
    h, z, multiplier = (normal(3, 12, 8, seed=seed) for seed in (3, 4, 5))
    gradient = [torch.zeros_like(p) for p in adapter.parameters()]
    add_local_gradient_(gradient, adapter, h, multiplier)

    mu, tolerance = LOCAL[estimator]
    zo = ZerothOrder(
        adapter.parameters(), module=adapter, probes=16, mu=mu, estimator=estimator, distribution=distribution
    )
    v = zo.project(lambda: lagrangian_term(z + adapter(h), multiplier, [slice(0, 3)]))[:, 0]
    assert _relative_error(v, zo.basis(0).project(gradient).double()) < tolerance
