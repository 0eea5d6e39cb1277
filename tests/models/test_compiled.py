"""`model.init_args.compile`: one graph a shape, for θ and every probe; what needs hooks runs as it was written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import SplitFedV2
from hosfl_lightning.optim import SGD
from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.run.checkpoint import CheckpointError
from hosfl_lightning.split import Side, SplitError, compiled
from hosfl_lightning.split.compiled import compile_half
from hosfl_lightning.split.products import WORTH, Products
from hosfl_lightning.wire import Message, ProjectedGradients
from tests.random_tokens import RandomTokens

#: Dynamo looks at the gradient of what it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a l")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[fx.GraphModule]]:
    """What is captured; it runs as it is, so nothing waits for a C++ compiler."""
    seen: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


@pytest.fixture
def even() -> RandomTokens:
    """Batches of one shape."""
    return RandomTokens([[12] * 8] * 3)


def close(a: SplitCausalLM, b: SplitCausalLM) -> None:
    torch.testing.assert_close(a.trained_state(), b.trained_state(), rtol=1e-3, atol=1e-4)


def test_one_graph_serves_theta_and_every_probe(
    graphs: list[fx.GraphModule], make_model: Callable[..., SplitCausalLM], even: RandomTokens,
    make_orchestrator: Callable[..., Orchestrator], sent: list[tuple[Message, int]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain, fast = make_model(), make_model(compile=True)
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert copy.deepcopy(fast.client_half)._compiled_call_impl is None
    for model in (plain, fast):
        make_orchestrator(HOSFL(probes=4, client_optimizer=SGD(lr=0.1))).fit(model, even)
    close(plain, fast)
    answers = [m.coefficients for m, _ in sent if isinstance(m, ProjectedGradients)]
    eagerly, compiledly = torch.stack(answers).float().chunk(2)
    torch.testing.assert_close(eagerly, compiledly, rtol=0.05, atol=0.05)
    assert compiledly.abs().min() > 0  # every probe moves z
    assert len(graphs) == 2  # of the client and of the server; evaluations of another shape make none
    told = capsys.readouterr().out
    assert "beside a copy of it (0.0 MB)" in told
    assert told.count("for compiling (model.init_args.compile)") == 1


@pytest.mark.parametrize("way", ["jvp", "local", "checkpointing"])
def test_what_needs_hooks_runs_as_it_was_written(
    way: str, graphs: list[fx.GraphModule], make_model: Callable[..., SplitCausalLM], even: RandomTokens,
    make_orchestrator: Callable[..., Orchestrator],
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"side": Side(client=4), "lora": None} if way == "local" else {}
    models = make_model(**settings), make_model(**settings, compile=True)
    rule = SGD(lr=0.1)
    for model in models:
        method = (
            SplitFedV2(client_optimizer=rule, checkpointing=True)
            if way == "checkpointing"
            else HOSFL(client_optimizer=rule, estimator=way, probes=2 if way == "jvp" else 256)
        )
        make_orchestrator(method, max_rounds=1).fit(model, even)
    close(*models)
    assert len(graphs) == (1 if way == "checkpointing" else 2)  # z at θ is compiled, where no graph is kept of it


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    graphs: list[fx.GraphModule], make_model: Callable[..., SplitCausalLM], tmp_path: Path,
    make_orchestrator: Callable[..., Orchestrator],
) -> None:  # fmt: skip
    uneven = RandomTokens([[12] * 4 + [8] * 4, [8] * 4 + [12] * 4])  # another shape comes first after the break
    settings: dict[str, Any] = {"enable_checkpointing": True, "simulation": "per_client"}
    whole, first, second = (make_model(compile=True) for _ in range(3))
    make_orchestrator(max_rounds=3, default_root_dir=str(tmp_path / "whole"), **settings).fit(whole, uneven)
    broken = make_orchestrator(max_rounds=1, default_root_dir=str(tmp_path / "broken"), **settings)
    broken.fit(first, uneven)
    torch._dynamo.reset()
    with pytest.raises(CheckpointError, match=r"model\.init_args\.compile is null, the run was made with true"):
        make_orchestrator(max_rounds=3, **settings).fit(make_model(), uneven, ckpt_path=broken.log_dir)
    make_orchestrator(max_rounds=3, **settings).fit(second, uneven, ckpt_path=broken.log_dir)
    assert all(torch.equal(whole.trained_state()[name], t) for name, t in second.trained_state().items())


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def test_what_cannot_be_compiled_is_told_by_the_setting(
    graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, short = Breaks(), nn.Linear(2, 2)
    compile_half(broken, "the client's half")
    with pytest.raises(SplitError, match=r"model\.init_args\.compile: the client's half cannot be compiled \(.*false"):
        broken(torch.ones(1, 2))
    with eager():
        assert broken(torch.ones(1, 2)).shape == (1, 2)
    monkeypatch.setattr(compiled, "SHAPES", 1)
    torch._dynamo.reset()
    compile_half(short, "it")
    short(torch.ones(1, 2))
    with pytest.raises(SplitError, match=r"compile: it has met one shape too many.*pad the data"):
        short(torch.ones(3, 2))


def test_without_a_compiler_nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(SplitError, match=r"model\.init_args\.compile: there is no C\+\+ compiler; install one"):
        compile_half(nn.Linear(2, 2), "it")


def test_large_products_are_those_of_the_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    k = 64
    a, b, c = (torch.randn(s, generator=generator) for s in ((WORTH // k**2, k), (k, k), (k,)))

    def work(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        large = [a @ b, torch.addmm(c, a, b), a[:, :8].t() @ a]
        return [*large, a[1:] @ b, torch.addmm(a, a, b), a.double() @ b.double()]

    graph = make_fx(work, tracing_mode="fake")(a, b, c)
    Products()(graph.graph)
    graph.recompile()
    replaced = [node.target for node in graph.graph.nodes].count(torch.ops.hosfl_lightning.product.default)
    assert replaced == 2 + (8 * k * len(a) >= WORTH)  # none too small, with another bias, or in another precision
    torch.testing.assert_close(graph(a, b, c), work(a, b, c), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor imports what torch deprecates
def test_inductor_reads_theta_as_its_input() -> None:
    half = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    x, bits = torch.linspace(-1, 1, WORTH // 64).view(-1, 64), []
    with torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            compile_half(half, "it")
            bits.append(half(x))
            before = half[0].weight.clone()
            half[0].weight.add_(0.5)
            moved = half(x)
            with eager():
                torch.testing.assert_close(moved, half(x))
            half[0].weight.copy_(before)
            assert (moved - bits[-1]).abs().max() > 0.1
    assert torch.equal(*bits)
