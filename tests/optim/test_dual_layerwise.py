"""Dual numbers in the place of parameters: the derivative is that of backprop, and the module is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import LlamaConfig, LlamaForCausalLM

from hosfl_lightning.memory import MemoryMeter
from hosfl_lightning.optim import EstimatorError, ZerothOrder
from hosfl_lightning.optim.probing import dual_layerwise
from hosfl_lightning.optim.readers import Readers
from tests.optim.test_probing import IDS, Net, ReadsItsChildren, Recursive, TiedHead, make, stream_of


class ReadsATiedChild(nn.Module):
    """A tensor of its own that it reads at a child, after that child has run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.child = nn.Embedding(40, 8), nn.Linear(8, 8, bias=False)
        self.weight = self.child.weight

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.child(self.embedding(ids))) @ self.child.weight


class Encoder(nn.Module):
    """Torch's own layer, which in eval mode is one fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2,
        )  # fmt: skip
        self.whole = LlamaForCausalLM(config)
        assert config._attn_implementation == "sdpa"

    def forward(self, ids: Tensor) -> Tensor:
        return self.whole(ids, attention_mask=torch.ones_like(ids).tril(2), use_cache=False).logits


FACTORIES: list[type[nn.Module]] = [Net, ReadsItsChildren, Recursive, TiedHead, ReadsATiedChild, Encoder, Llama]


def loss(module: nn.Module) -> Tensor:
    out = module(IDS).double()
    return (out * torch.linspace(0.1, 1, out.shape[-1])).square().mean()


def by_backprop(module: nn.Module) -> Tensor:
    zo = jvp(module)
    gradient = torch.autograd.grad(loss(module), zo.parameters, materialize_grads=True)
    return zo.basis(0).project(gradient).double()


def jvp(module: nn.Module, **settings: Any) -> ZerothOrder:
    return ZerothOrder(module.parameters(), module=module, estimator="jvp", **{"probes": 4, **settings})


def places(module: nn.Module) -> list[tuple[nn.Module, str, int, bool]]:
    """Every parameter where it is held, in order, as an object; and whether it asks for a gradient."""
    return [
        (holder, name, id(p), p.requires_grad)
        for holder in module.modules()
        for name, p in holder._parameters.items()
        if p is not None
    ]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("training", [False, True])
def test_the_derivative_is_that_of_backprop_and_nothing_is_left(factory: type[nn.Module], training: bool) -> None:
    module = make(factory).train(training)
    next(module.parameters()).requires_grad_(False)
    expected = by_backprop(module.requires_grad_())
    next(module.parameters()).requires_grad_(False)
    found, bits = places(module), [p.detach().clone() for p in module.parameters()]
    state, fast = torch.random.get_rng_state(), torch.backends.mha.get_fastpath_enabled()

    v = jvp(module).project(lambda: loss(module))

    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-6)
    assert not v.requires_grad
    assert places(module) == found
    assert all(torch.equal(p, before) and p.grad is None for p, before in zip(module.parameters(), bits))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("factory", FACTORIES)
def test_in_bf16(factory: type[nn.Module]) -> None:
    module = make(factory, torch.bfloat16)
    expected = by_backprop(make(factory, torch.bfloat16).float())
    error = jvp(module).project(lambda: loss(module)) - expected
    assert error.norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("factory", [Net, Llama])
def test_under_autocast(factory: type[nn.Module]) -> None:
    module = make(factory)
    expected = by_backprop(module)
    with torch.autocast("cpu", torch.bfloat16):
        error = jvp(module).project(lambda: loss(module)) - expected
    assert 0 < error.norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, NotImplementedError])
@pytest.mark.parametrize("where", ["twice", "embedding", "large", ""])
def test_parameters_are_back_after_an_error(error: type[BaseException], where: str) -> None:
    net = make(Net)
    found = places(net)

    def fail(*_: Any) -> None:
        raise error("midway")

    net.get_submodule(where).forward = fail
    with pytest.raises(error, match="midway"):
        jvp(net).project(lambda: loss(net))
    assert places(net) == found
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_only_what_is_probed_moves() -> None:
    net = make(Net)
    zo, chosen = jvp(net), {4, 5}
    gradient = torch.autograd.grad(loss(net), zo.parameters, materialize_grads=True)
    expected = zo.basis(0).project([g * (i in chosen) for i, g in enumerate(gradient)]).double()
    zo.probed = chosen
    torch.testing.assert_close(zo.project(lambda: loss(net)), expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().min() > 0


def tangent_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes at the peak of a forward on dual numbers beyond those of its activations, twice."""

    def peak(dual: bool) -> int:
        with MemoryMeter() as meter, meter.role("probe"), torch.no_grad(), torch.autograd.forward_ad.dual_level():
            if dual:
                with dual_layerwise(net, Readers(list(net.parameters())), stream_of()):
                    net(x)
            else:
                net(x)
        return meter.peak("probe")

    peak(True)  # constants of the generator are made once
    return peak(True) - 2 * peak(False)


def test_of_an_embedding_only_looked_up_rows_have_a_tangent() -> None:
    table = make(lambda: nn.Embedding(20000, 64))
    assert tangent_bytes(table, IDS) < 20000 * 64


def test_one_leaf_at_a_time_has_a_tangent() -> None:
    net = make(lambda: nn.Sequential(nn.Linear(128, 8192), nn.Linear(8192, 128), nn.Linear(128, 8192)))
    leaf, whole, scratch = 4 * (129 * 8192), 4 * sum(p.numel() for p in net.parameters()), 4 << 20
    assert leaf <= tangent_bytes(net, torch.ones(1, 128)) <= leaf + scratch < whole


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (Doubled.apply, r"one has none \(You must implement the jvp.*set estimator: central"),
        (Tensor.detach, r"no derivative reaches the objective.*set estimator: central"),
    ],
)
def test_what_has_no_forward_derivative_is_said(behind: Callable[[Tensor], Tensor], message: str) -> None:
    net = make(lambda: nn.Linear(4, 4))
    found = places(net)
    with pytest.raises(EstimatorError, match=message):
        jvp(net).project(lambda: behind(net(torch.ones(1, 4))).sum())
    assert places(net) == found


def test_without_a_module_it_is_refused() -> None:
    with pytest.raises(EstimatorError, match="pass module="):
        ZerothOrder([nn.Parameter(torch.zeros(2))], estimator="jvp")
