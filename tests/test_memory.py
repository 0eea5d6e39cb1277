from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hosfl_lightning.memory import MemoryMeter, plain_forward_peak

KIB = 1024
SLACK = 64


def _kib(count: int = 1) -> Tensor:
    return torch.ones(count * KIB // 4)


@cache
def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, num_attention_heads=4, **sizes)).eval()


X = torch.linspace(-1, 1, 128 * 64).reshape(128, 64)
W = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
IDS = torch.arange(128).reshape(4, 32) % 97


def _loss(weight: Tensor) -> Tensor:
    return nn.functional.cross_entropy(torch.tanh(X @ weight) @ W, torch.arange(128) % 64)


def _forward() -> Tensor:
    return _loss(W)


def _backward() -> Tensor:
    weight = W.clone().requires_grad_()
    _loss(weight).backward()
    return weight


def _vjp() -> object:
    out, pullback = torch.func.vjp(lambda weight: torch.tanh(X @ weight), W)
    return out, pullback(out)


def _jvp() -> object:
    return torch.func.jvp(lambda weight: torch.tanh(X @ weight), (W,), (torch.ones(64, 64),))


def _in_place() -> Tensor:
    a = torch.zeros(3000)
    a.add_(1).mul_(2)
    a[10:20].sub_(1)
    return a


def _views() -> list[Tensor]:
    a = torch.zeros(40, 100)
    return [a, a.t(), a[3:7], a.view(-1), a.detach(), *a.split(10), a.expand(5, 40, 100)]


def _view_outlives_base() -> Tensor:
    return (X * 2)[:1]


def _resize() -> Tensor:
    a = torch.empty(0)
    torch.add(X, X, out=a)
    return a.resize_(20_000)


def _several_outputs() -> object:
    return (
        X.sort(),
        torch.cat([X, X]),
        [part * 2 for part in X.split(20)],
        X.max(dim=0),
        torch._foreach_mul([X, W], 2.0),
    )


def _adamw() -> None:
    weight = nn.Parameter(W.clone())
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    for _ in range(2):
        _loss(weight).backward()
        optimizer.step()
        optimizer.zero_grad()


def _llama_no_grad() -> Tensor:
    with torch.no_grad():
        return _llama()(IDS, use_cache=False).logits


def _llama_inference() -> Tensor:
    with torch.inference_mode():
        return _llama()(IDS, use_cache=False).logits


def _llama_graph() -> Tensor:
    return _llama()(IDS, use_cache=False).logits


def _vmap() -> Tensor:
    return torch.func.vmap(lambda scale: torch.tanh(X @ (W * scale)).sum())(torch.arange(5.0))


WORKLOADS = [
    _forward,
    _backward,
    _vjp,
    pytest.param(_jvp, marks=pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")),
    _vmap,
    _in_place,
    _views,
    _view_outlives_base,
    _resize,
    _several_outputs,
    _adamw,
    _llama_no_grad,
    _llama_inference,
    _llama_graph,
]


def _allocator_trace(workload: Callable[[], object]) -> tuple[int, int]:
    """Peak and final bytes from the profiler's record of every allocation: the independent reference."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = workload()
    del kept
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.__name__.strip("_<>"))
def test_agrees_with_the_allocator_trace(workload: Callable[[], object]) -> None:
    workload()
    peak, live = _allocator_trace(workload)
    meter = MemoryMeter()
    with meter, meter.role("client"):
        kept = workload()
    assert abs(meter.peak("client") - peak) <= SLACK
    assert abs(meter.live("client") - live) <= SLACK
    del kept
    gc.collect()
    assert meter.live("client") == 0


def test_roles_pay_for_what_they_create() -> None:
    meter = MemoryMeter()
    with meter:
        with meter.role("client"):
            z = _kib(2)
            with meter.role("server"):
                head = _kib(5)
            taps = _kib(1)
        stray = _kib(7)
    assert [meter.live(role) for role in ("client", "server", "unassigned")] == [3 * KIB, 5 * KIB, 7 * KIB]
    with meter, meter.role("server"):
        z.add_(1)
        received = z.clone()
    assert (meter.live("client"), meter.live("server")) == (3 * KIB, 7 * KIB)
    del head, received, stray, taps
    assert (meter.live("client"), meter.live("server"), meter.live("unassigned")) == (2 * KIB, 0, 0)


def test_a_role_ends_with_its_block_even_by_an_error() -> None:
    meter = MemoryMeter()
    with meter:
        with pytest.raises(RuntimeError, match="size"), meter.role("client"):
            torch.ones(2) + torch.ones(3)
        kept = _kib()
    assert meter.live("unassigned") == kept.nbytes == KIB


def test_adopted_storages_count_once_and_stay_with_their_first_role() -> None:
    embedding = _kib(4)
    meter = MemoryMeter()
    meter.adopt("client", [embedding, embedding.view(32, 32), embedding[:7], _sparse(), embedding.to("meta")])
    meter.adopt("server", [embedding.t() if embedding.dim() == 2 else embedding])
    assert (meter.live("client"), meter.live("server")) == (4 * KIB, 0)
    del embedding
    assert (meter.live("client"), meter.peak("client")) == (0, 4 * KIB)


def _sparse() -> Tensor:
    return torch.sparse_coo_tensor(torch.zeros(1, 2, dtype=torch.int64), torch.ones(2), (4,), check_invariants=False)


def test_what_was_there_before_is_not_counted_unless_adopted() -> None:
    weight = _kib(4)
    meter = MemoryMeter()
    with meter, meter.role("client"):
        weight.add_(1)
        kept = weight.view(-1)[:2], torch.add(weight, 1, out=weight)
    assert meter.peak("client") == 0
    del kept


def test_peak_of_a_phase() -> None:
    meter = MemoryMeter()
    with meter, meter.role("client"):
        parameters = _kib(10)
        _kib(90)
        assert meter.peak("client") == 100 * KIB
        meter.reset_peak("client")
        assert meter.peak("client") == meter.live("client") == 10 * KIB
        _kib(5)
        assert meter.peak("client") == 15 * KIB
        with meter.role("server"):
            _kib(3)
        meter.reset_peak()
    assert (meter.peak("client"), meter.peak("server")) == (10 * KIB, 0)
    del parameters


def test_what_is_held_while_waiting_is_the_graph_or_z_alone() -> None:
    model = _llama()
    held = {}
    for name in ("first order", "forward only"):
        meter = MemoryMeter()
        meter.adopt("client", model.parameters())
        resident = meter.live("client")
        assert resident == sum(p.nbytes for p in model.parameters())
        with meter, meter.role("client"), torch.set_grad_enabled(name == "first order"):
            z = model.model(IDS, use_cache=False).last_hidden_state
        held[name] = meter.live("client") - resident
    assert held["forward only"] == z.nbytes
    assert held["first order"] > 10 * z.nbytes


def test_backward_is_booked_to_the_role_that_runs_it() -> None:
    meter = MemoryMeter()
    weight = W.clone().requires_grad_()
    meter.adopt("server", [weight])
    with meter:
        with meter.role("client"):
            z = X.clone().requires_grad_()
        with meter.role("server"):
            torch.tanh(z @ weight).sum().backward()
    assert meter.live("client") == z.nbytes
    assert z.grad is not None
    assert meter.live("server") == 2 * weight.nbytes + z.grad.nbytes


def test_suspended_storages_are_not_counted_but_their_end_is() -> None:
    meter = MemoryMeter()
    with meter, meter.role("client"):
        a = _kib(2)
        with meter.suspend():
            b = _kib(5)
            del a
            assert meter.live("client") == 0
        b.add_(1)
        assert meter.peak("client") == 2 * KIB
        c = _kib(3)
    assert meter.live("client") == c.nbytes == 3 * KIB


def test_suspended_below_another_mode() -> None:
    outer, inner = MemoryMeter(), MemoryMeter()
    with outer, outer.role("o"), inner, inner.role("i"):
        with outer.suspend():
            a = _kib(2)
        b = _kib(3)
    assert (outer.live("o"), inner.live("i")) == (3 * KIB, 5 * KIB)
    del a, b


def test_suspending_takes_the_meter_out_of_the_way() -> None:
    """The switch is worth its name only if operators do not pass through Python any more."""
    calls = []
    meter = MemoryMeter()
    with meter, meter.suspend():
        sys.setprofile(lambda frame, *_: calls.append(frame.f_code.co_name))
        try:
            torch.ones(1).add_(1)
        finally:
            sys.setprofile(None)
    assert "__torch_dispatch__" not in calls


def test_an_ended_meter_sees_the_end_of_storages_and_may_go_on() -> None:
    meter = MemoryMeter()
    with meter, meter.role("client"):
        a, b = _kib(1), _kib(2)
    del a
    assert meter.live("client") == 2 * KIB
    _kib(50)
    with meter, meter.role("client"):
        c = _kib(4)
    assert (meter.live("client"), meter.peak("client")) == (6 * KIB, 6 * KIB)
    del b, c


def test_the_meter_keeps_nothing_alive_and_may_end_before_the_tensors() -> None:
    meter = MemoryMeter()
    with meter, meter.role("client"):
        kept = _kib(1)
        storage = weakref.ref(kept.untyped_storage())
    gone = weakref.ref(meter)
    del meter
    gc.collect()
    assert gone() is None
    assert storage() is not None
    del kept
    assert storage() is None


def test_an_unknown_role_is_named() -> None:
    meter = MemoryMeter()
    meter.adopt("client", [])
    assert meter.live("client") == 0
    for ask in (meter.live, meter.peak, meter.reset_peak):
        with pytest.raises(KeyError, match=r"no role 'clinet'.*client"):
            ask("clinet")


def test_plain_forward_peak_leaves_out_what_was_there_and_builds_no_graph() -> None:
    model = _llama()
    peak, _ = _allocator_trace(_llama_no_grad)
    assert abs(plain_forward_peak(lambda: model(IDS, use_cache=False)) - peak) <= SLACK
