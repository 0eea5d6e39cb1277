from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.optim.basis import CHUNK
from hosfl_lightning.optim.probing import perturbed_in_place, perturbed_layerwise
from hosfl_lightning.optim.readers import Readers
from hosfl_lightning.rng import DISTRIBUTIONS, Stream, direction, round_coefficient

Probe = Callable[[nn.Module, Stream, Tensor], AbstractContextManager[None]]
M = TypeVar("M", bound=nn.Module)
PROBES: dict[str, Probe] = {
    "layerwise": lambda m, stream, scale: perturbed_layerwise(m, Readers(list(m.parameters())), stream, scale),
    "in_place": lambda m, stream, scale: perturbed_in_place(Readers(list(m.parameters())), stream, scale),
}
IDS = torch.tensor([[3, 7, 7, 1], [0, 3, 9, 7]])


class Net(nn.Module):
    """An embedding, norms, a module used twice, LoRA-like small tensors, a large tensor, parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.norm = nn.LayerNorm(8)
        self.twice = nn.Linear(8, 8)
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.large = nn.Linear(8, CHUNK // 8 + 10)
        self.unused = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embedding(ids))
        h = self.twice(torch.tanh(self.twice(h))) + self.lora_b(self.lora_a(h))
        return self.large(h)[..., ::1000] * self.scale


def make(factory: Callable[[], M], dtype: torch.dtype = torch.float32) -> M:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return factory().to(dtype)


def stream_of(distribution: str = "rademacher") -> Stream:
    return Stream(5, DISTRIBUTIONS[distribution], round=2, probe=1)


def scale_of(mu: float, distribution: str = "rademacher") -> Tensor:
    return torch.tensor(round_coefficient(mu, DISTRIBUTIONS[distribution]), dtype=torch.float32)


def bits(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(_flat(a), _flat(b), strict=True))


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().reshape(-1) for t in tensors]


def expected_at(parameter: Tensor, tensor: int, stream: Stream, scale: Tensor) -> Tensor:
    u = direction(stream, tensor, 0, parameter.numel()).view(parameter.shape)
    return torch.addcmul(parameter.detach().float(), u, scale).to(parameter.dtype)


class Seen:
    """What a module's own parameters are at the moment its forward runs."""

    def __init__(self, module: nn.Module) -> None:
        self.values: dict[str, Tensor] = {}
        names = {id(p): name for name, p in module.named_parameters()}

        def look(leaf: nn.Module, *_: Any) -> None:
            for p in leaf.parameters(recurse=False):
                self.values[names[id(p)]] = p.detach().clone()

        self.handles = [leaf.register_forward_pre_hook(look) for leaf in module.modules()]

    def __enter__(self) -> Seen:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_old_bits_are_back_after_a_hundred_probes(kind: str, dtype: torch.dtype) -> None:
    net = make(Net, dtype)
    before = bits(net)
    for probe in range(100):
        with PROBES[kind](net, Stream(5, DISTRIBUTIONS["rademacher"], probe=probe), scale_of(1e-3 * (-1) ** probe)):
            net(IDS)
    assert same(bits(net), before)


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["twice", "embedding", ""])
@torch.no_grad()
def test_the_old_bits_are_back_after_an_error(kind: str, error: type[BaseException], where: str) -> None:
    net = make(Net)
    before = bits(net)

    def fail(*_: Any) -> None:
        raise error("midway")

    net.get_submodule(where).forward = fail
    with pytest.raises(error, match="midway"), PROBES[kind](net, stream_of(), scale_of(0.1)):
        net(IDS)
    assert same(bits(net), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_leaf_sees_the_sum_in_fp32_cast_once(dtype: torch.dtype, distribution: str) -> None:
    net = make(Net, dtype)
    stream, scale = stream_of(distribution), scale_of(0.01, distribution)
    with PROBES["layerwise"](net, stream, scale), Seen(net) as seen:
        net(IDS)
    assert set(seen.values) == {name for name, _ in net.named_parameters() if not name.startswith("unused")}
    for tensor, (name, parameter) in enumerate(net.named_parameters()):
        expected = expected_at(parameter, tensor, stream, scale)
        if name == "embedding.weight":
            rows = IDS.unique()
            assert torch.equal(seen.values[name][rows], expected[rows])
        elif name in seen.values:
            assert torch.equal(seen.values[name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_in_place_moves_every_tensor_by_the_sum_in_fp32_cast_once(dtype: torch.dtype) -> None:
    net = make(Net, dtype)
    stream, scale = stream_of("gauss16"), scale_of(0.01, "gauss16")
    expected = [expected_at(p, tensor, stream, scale) for tensor, p in enumerate(net.parameters())]
    with PROBES["in_place"](net, stream, scale):
        assert same(bits(net), expected)


class ReadsItsChildren(nn.Module):
    """Parameters in lists and dictionaries, which nobody calls, and attention, which never calls its projection."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.ones(8), torch.zeros(8)])
        self.named = nn.ParameterDict({"a": torch.ones(8)})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.embedding = nn.Embedding(40, 8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(input=ids.int()) * self.listed[0] + self.listed[1]
        return self.attention(h, h, h, need_weights=False)[0] * self.named["a"]


class Recursive(nn.Module):
    """A forward that calls itself, and a child that shares a tensor of its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8) / 2)
        self.child = nn.Linear(8, 8)
        self.child.weight = self.weight
        self.embedding = nn.Embedding(8, 8)
        self.embedding.weight = self.weight

    def forward(self, ids: Tensor, depth: int = 2) -> Tensor:
        inner = self(ids, depth - 1) if depth else self.embedding(ids % 8)
        return torch.tanh(self.child(inner) @ self.weight)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


@pytest.mark.parametrize("factory", [Net, ReadsItsChildren, Recursive, TiedHead])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layerwise_gives_the_outputs_of_in_place(factory: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    net = make(factory, dtype)
    before = bits(net)
    outputs = []
    for probe in PROBES.values():
        with probe(net, stream_of(), scale_of(0.05)):
            outputs.append(net(IDS))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], net(IDS))
    assert same(bits(net), before)


@pytest.mark.parametrize("repeats", [1, 3, 30])
@torch.no_grad()
def test_an_embedding_moves_only_rows_that_are_looked_up(repeats: int) -> None:
    """Repeated tokens count once; with more tokens than rows the whole table is cheaper."""
    table = make(lambda: nn.Embedding(40, 8))
    before = bits(table)[0]
    with PROBES["layerwise"](table, stream_of(), scale_of(0.05)), Seen(table) as seen:
        out = table(IDS.repeat(1, repeats))
    moved = (seen.values["weight"] != before).any(1).nonzero().view(-1).tolist()
    assert moved == (IDS.unique().tolist() if repeats < 30 else list(range(40)))
    assert torch.equal(out[0, 0], expected_at(before, 0, stream_of(), scale_of(0.05))[3])
    assert torch.equal(table.weight, before)


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


@pytest.mark.parametrize("factory", [lambda: Shifted(40, 8), lambda: nn.Embedding(40, 8, max_norm=1.0)])
@torch.no_grad()
def test_an_unusual_embedding_moves_whole(factory: Callable[[], nn.Embedding]) -> None:
    table = make(factory)
    expected = expected_at(bits(table)[0], 0, stream_of(), scale_of(0.05))
    with PROBES["layerwise"](table, stream_of(), scale_of(0.05)), Seen(table) as seen:
        table(IDS)
    assert torch.equal(seen.values["weight"], expected)


def probe_bytes(net: nn.Module, kind: str, x: Tensor) -> int:
    """Bytes at the peak of a probe beyond those of the same forward at θ."""

    def peak(probed: bool) -> int:
        with MemoryMeter() as meter, meter.role("probe"), torch.no_grad():
            if probed:
                with PROBES[kind](net, stream_of(), scale_of(0.05)):
                    net(x)
            else:
                net(x)
        return meter.peak("probe")

    peak(True)  # constants of the generator are made once
    return peak(True) - peak(False)


def test_the_extra_memory_is_the_largest_leaf_and_bounded_scratch() -> None:
    net = make(lambda: nn.Sequential(nn.Linear(128, 8192), nn.Linear(8192, 128), nn.Linear(128, 8192)))
    leaf, whole, scratch = 4 * (129 * 8192), 4 * sum(p.numel() for p in net.parameters()), 4 << 20
    x = torch.ones(1, 128)
    assert leaf <= probe_bytes(net, "layerwise", x) <= leaf + scratch < whole
    assert probe_bytes(net, "in_place", x) >= whole


def test_of_small_tensors_packed_bits_are_kept() -> None:
    net = make(lambda: nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(256))))
    leaf, packed, scratch = 4 * 128**2, 256 * 128**2 // 8, 4 << 20
    assert probe_bytes(net, "layerwise", torch.ones(1, 128)) <= leaf + packed + scratch
    assert 3 * (leaf + packed + scratch) < 4 * 256 * 128**2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_while_a_leaf_runs_little_is_held_beside_its_saved_bits(distribution: str) -> None:
    """What outlives a hook adds to the activations' peak: packed words and one expanded run."""
    net = make(lambda: nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8))))
    stream, scale, x = stream_of(distribution), scale_of(0.05, distribution), torch.ones(1, 256)
    held: list[int] = []
    with PROBES["layerwise"](net, stream, scale):
        net(x)  # constants of the generator are made once
    with MemoryMeter() as meter, meter.role("probe"), torch.no_grad(), PROBES["layerwise"](net, stream, scale):
        for leaf in net:
            leaf.register_forward_pre_hook(lambda *_: held.append(meter.live("probe")))
        net(x)
    leaf_bytes, run = 4 * 256**2, 256 << 10
    packed = 8 * 256**2 * {"rademacher": 1, "gauss16": 16}[distribution] // 8
    assert leaf_bytes < max(held) <= leaf_bytes + packed + run + 4096


def test_an_embedding_needs_no_copy_of_its_table() -> None:
    table = make(lambda: nn.Embedding(20000, 64))
    assert probe_bytes(table, "layerwise", IDS) < 20000 * 64


@pytest.mark.parametrize("kind", PROBES)
def test_no_gradient_no_graph_and_modes_as_found(kind: str) -> None:
    net = make(Net)
    before = bits(net)
    zo = ZerothOrder(net.parameters(), module=net if kind == "layerwise" else None, probes=2, mu=0.05)
    outputs: list[Tensor] = []

    def objective() -> Tensor:
        outputs.append(net(IDS))
        return outputs[-1].square().mean()

    base = net(IDS).square().mean()
    v = zo.project(objective, base=base)
    assert v.abs().min() > 0
    assert base.requires_grad
    assert not v.requires_grad
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(out.requires_grad for out in outputs)
    assert same(bits(net), before)


@torch.no_grad()
def test_a_leaf_that_is_never_called_is_left_alone() -> None:
    net = make(Net)
    pointers = [p.data_ptr() for p in net.parameters()]
    before = bits(net)
    with PROBES["layerwise"](net, stream_of(), scale_of(0.05)):
        net(IDS)
        assert torch.equal(net.unused.weight, before[[n for n, _ in net.named_parameters()].index("unused.weight")])
        assert same(bits(net), before)
    assert [p.data_ptr() for p in net.parameters()] == pointers


@torch.no_grad()
def test_a_frozen_tensor_is_not_moved() -> None:
    net = make(Net)
    stream, scale = stream_of(), scale_of(0.05)
    chosen = [p for name, p in net.named_parameters() if name.startswith("lora")]
    with perturbed_layerwise(net, Readers(chosen), stream, scale), Seen(net) as seen:
        net(IDS)
    moved = {
        name for name, p in net.named_parameters() if name in seen.values and not torch.equal(seen.values[name], p)
    }
    assert moved == {"lora_a.weight", "lora_b.weight"}
    assert torch.equal(seen.values["lora_b.weight"], expected_at(chosen[1], 1, stream, scale))


@pytest.fixture
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("kind", PROBES)
@torch.no_grad()
def test_autocast_keeps_no_cast_from_one_side_of_a_probe(kind: str, autocast: None) -> None:
    """Inside one autocast context a cast weight is kept: a probe would see θ, the next forward θ'."""
    net = make(lambda: nn.Linear(8, 8))
    x = torch.ones(1, 8)
    at_theta = net(x)
    with PROBES[kind](net, stream_of(), scale_of(0.5)):
        at_probe = net(x)
    again = net(x)
    assert not torch.equal(at_probe, at_theta)
    assert torch.equal(again, at_theta)
