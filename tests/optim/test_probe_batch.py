"""Several probes in one forward, against the same probes one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.optim.probe_batch import ProbeBatch, UnbatchedError, estimated, points_of
from hosfl_lightning.optim.probing import SHARED
from hosfl_lightning.rng import DISTRIBUTIONS, direction
from hosfl_lightning.split import split, split_images
from tests.split.tiny_images import images, tiny_image_model
from tests.split.tiny_models import CAUSAL, tiny_causal_lm, tiny_classifier

Batch = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)
IDS = torch.tensor([[3, 7, 7, 1], [0, 3, 9, 7]])


class Net(nn.Module):
    """Leaves of many kinds: looked-up rows, used twice, with and without bias, large, and inside of another reader."""

    inputs = ("input_ids",)

    def __init__(self, large: int = 40) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(40, 8), nn.LayerNorm(8)
        self.twice, self.lora = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.outer = Scaled(large)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embedding(ids))
        h = self.twice(torch.tanh(self.twice(h))) + self.lora(h)
        return self.outer(h, factor=torch.ones(len(h), 1, 1))


class Scaled(nn.Module):
    """Reads a tensor of its own, and calls a child that reads another."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.scale, self.inside = nn.Parameter(torch.tensor(1.5)), nn.Linear(8, large)

    def forward(self, h: Tensor, factor: Tensor) -> Tensor:
        return self.inside(h)[..., :40] * self.scale * factor


def run(net: nn.Module) -> Callable[[Batch], Tensor]:
    inputs: Any = net.inputs
    return lambda batch: net(*(batch[name] for name in inputs))


def made(kind: Callable[[], M]) -> M:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return kind()


def optimizer_of(net: nn.Module, **settings: Any) -> ZerothOrder:
    net.eval().requires_grad_(False)
    return ZerothOrder(net.parameters(), module=net, **{"probes": 3, "mu": 2**-7, **settings})


@torch.no_grad()
def both(optimizer: ZerothOrder, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each point its output in a batch of all and alone, and the output at θ."""
    net: Any = optimizer.module
    basis, together = optimizer.basis(1), ProbeBatch(optimizer)
    with together.noting() as calls:
        base = run(net)(batch)
    points, alone = points_of(optimizer, basis), []
    for probe, scale in points:
        with optimizer.perturbed(basis, probe, scale):
            alone.append(run(net)(batch))
    return together(run(net), batch, calls, basis, points), torch.stack(alone), base


@pytest.mark.parametrize("distribution", ["rademacher", "gauss16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_copy_has_the_bits_of_its_probe(dtype: torch.dtype, distribution: str) -> None:
    net = made(lambda: Net(large=SHARED[DISTRIBUTIONS[distribution]] // 8 + 1)).to(dtype)
    optimizer = optimizer_of(net, distribution=distribution, estimator="central")
    optimizer.probed = {0, 3, 4, 6, 8}
    basis, together = optimizer.basis(2), ProbeBatch(optimizer)
    tensors = together._readers()[1]
    assert set(tensors) == optimizer.probed
    points = points_of(optimizer, basis)
    for some in (points, points[-1:]):
        moved = together._moved(tensors, basis, some)
        for number, parameter in tensors.items():
            before = parameter.float().flatten()
            for (probe, scale), value in zip(some, moved[id(parameter)], strict=True):
                u = direction(basis.streams[probe], number, 0, len(before))
                assert torch.equal(value.flatten(), torch.addcmul(before, u, torch.tensor(scale)).to(dtype))


def test_a_batch_is_its_probes_one_by_one() -> None:
    optimizer = optimizer_of(made(Net), estimator="central")
    before = [p.clone() for p in optimizer.parameters]
    together, alone, base = both(optimizer, {"input_ids": IDS})
    assert together.shape == (6, 2, 4, 40)
    assert (alone - base).abs().max() > 0.05
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, before, optimizer.parameters))
    assert not any("forward" in vars(part) for part in optimizer.module.modules())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "bloom", "modernbert", "roberta", "ViT", "ResNet", "Swinv2"])
def test_families_run_in_a_batch(name: str) -> None:
    """With all that there is to train but embeddings: attention, norms, biases, convolutions, class tokens."""
    if name in ("ViT", "ResNet", "Swinv2"):
        half: Any = split_images(tiny_image_model(name), 1, 32)[0]
        batch = {half.inputs[0]: images(2)}
    else:
        half, _ = split((tiny_causal_lm if name in CAUSAL else tiny_classifier)(name), 2, check=False)
        mask = (torch.arange(7) < torch.tensor([[7], [5]])).long()
        batch = {"input_ids": torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0)),
                 "attention_mask": mask}  # fmt: skip
    optimizer = optimizer_of(half)
    tables = {id(part.weight) for part in half.modules() if isinstance(part, nn.Embedding)}
    optimizer.probed = {i for i, p in enumerate(optimizer.parameters) if id(p) not in tables}
    together, alone, base = both(optimizer, batch)
    moved = (alone - base).abs().max()
    assert moved > 1e-3
    assert (together - alone).abs().max() < 1e-3 * moved


class Other(nn.Module):
    """A net whose leaf is called in another way."""

    inputs = ("x",)

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.leaf = way, nn.Linear(4, 4)
        if way == "table":
            self.leaf = nn.Embedding(5, 4)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "positions first":
            return self.leaf(x.transpose(0, 1)).transpose(0, 1)
        if self.way == "table":
            return x + self.leaf(torch.arange(x.shape[1])[None])
        if self.way == "never":
            return x
        return self.leaf(x) if len(x) < 4 else x + self.leaf.weight.sum()


@pytest.mark.parametrize("way", ["positions first", "table", "never", "by the size of the batch"])
def test_who_takes_no_examples_first_is_refused(way: str) -> None:
    optimizer = optimizer_of(Other(way), probes=3)
    together, basis, batch = ProbeBatch(optimizer), optimizer.basis(0), {"x": torch.randn(2, 3, 4)}
    with together.noting() as calls, torch.no_grad():
        run(together.module)(batch)
    with pytest.raises(UnbatchedError, match=r"first dimension|as the batch alone|nothing that is probed runs"):
        together(run(together.module), batch, calls, basis, points_of(optimizer, basis))
    assert not any("forward" in vars(part) for part in together.module.modules())


@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_the_estimator_makes_the_same_of_values_that_are_known(estimator: str) -> None:
    optimizer = optimizer_of(made(Net), estimator=estimator)
    basis, net = optimizer.basis(1), run(optimizer.module)  # type: ignore[arg-type]

    def objective() -> Tensor:
        return net({"input_ids": IDS}).double().sum((1, 2))

    base, values = objective(), {}
    for probe, scale in points_of(optimizer, basis):
        with optimizer.perturbed(basis, probe, scale):
            values[probe, scale] = objective()
    expected = optimizer.project(objective, basis=basis, base=base)
    assert torch.equal(estimated(optimizer, basis, values, base), expected)
    assert expected.shape == (3, 2)
