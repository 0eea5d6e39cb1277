from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import (
    FSLSAGE,
    HERONSFL,
    HOSL,
    Algorithm,
    FedAvg,
    SplitFedSGD,
    SplitFedV1,
    SplitLearning,
)
from hosfl_lightning.callbacks import PeakMemoryMonitor, peak_memory_monitor
from hosfl_lightning.callbacks.peak_memory_monitor import flops_of, measure_compute
from hosfl_lightning.callbacks.rehearsal import Around
from hosfl_lightning.memory import storage_bytes
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.wire import StepRequest
from tests.conftest import RandomTokens
from tests.small_run import adamw


def report(trainer: Orchestrator) -> dict[str, float]:
    return next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor)).report


@pytest.fixture
def long_rows() -> RandomTokens:
    return RandomTokens([[48] * 4, [48] * 4])


def test_forward_only_waits_with_z_and_first_order_with_its_graph(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], long_rows: RandomTokens
) -> None:
    reports = []
    for algorithm in (HOSFL(client_optimizer=SGD(lr=0.1)), SplitFedSGD(SGD(lr=0.1))):
        trainer = make_orchestrator(algorithm, max_rounds=1)
        trainer.fit(make_model(), long_rows)
        reports.append(report(trainer))
    ours, first_order = reports
    z = 4 * 48 * 32 * 4
    assert z <= ours["client_waiting_bytes"] <= z + 1024
    assert first_order["client_waiting_bytes"] > 10 * z
    assert ours["client_forward_bytes"] == first_order["client_forward_bytes"]
    inference = ours["client_forward_bytes"] - ours["client_static_bytes"]
    working = ours["client_peak_bytes"] - ours["client_static_bytes"]
    # During the probes λ is there and z is not; the adapter's packed directions and saved bits are small.
    assert inference + z <= working <= inference + z + z // 2
    assert 2 * inference < first_order["client_peak_bytes"] - first_order["client_static_bytes"]


def test_static_bytes_are_exact_and_count_the_optimizer(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], long_rows: RandomTokens
) -> None:
    model = make_model()
    half = model.client_half
    exact = sum(t.numel() * t.element_size() for t in [*half.parameters(), *half.buffers()])
    assert storage_bytes([*half.parameters(), *half.buffers()]) == exact
    d_client = sum(p.numel() for p in model.client_parameters.values())
    peaks = []
    for rule, slots in ((SGD(lr=0.1), 0), (SGD(lr=0.1, momentum=0.9), 1), (AdamW(lr=0.1), 2)):
        trainer = make_orchestrator(HOSFL(client_optimizer=rule), max_rounds=1)
        trainer.fit(make_model(), long_rows)
        assert report(trainer)["client_static_bytes"] == exact + slots * 4 * d_client
        peaks.append(report(trainer)["client_peak_bytes"] - slots * 4 * d_client)
    assert peaks[0] == peaks[1] == peaks[2]  # the state is there all the time, the peak is in a probe


def test_it_is_one_clients_batch_whatever_runs_jointly(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    reports = []
    for clients in (1, 3):
        trainer = make_orchestrator(max_rounds=1)
        trainer.fit(make_model(), RandomTokens([[32] * 4] * clients))
        reports.append({name: value for name, value in report(trainer).items() if name != "client_seconds"})
    assert reports[0] == reports[1]


@pytest.mark.parametrize("method", [HOSFL, HOSL, SplitFedV1, SplitLearning, HERONSFL, FSLSAGE, FedAvg])
def test_a_measured_run_is_the_unmeasured_run(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    monkeypatch: pytest.MonkeyPatch, method: type[Algorithm],
) -> None:  # fmt: skip
    """Of methods that keep moments, heads and server halves of clients as well."""
    settings: dict[str, Any] = {"auxiliary_blocks": 1} if method is FSLSAGE else {}
    algorithm = method(client_optimizer=AdamW(lr=0.01), **settings)

    def train() -> dict[str, torch.Tensor]:
        model = make_model(client_holds=algorithm.client_holds, optimizer=adamw)
        make_orchestrator(algorithm).fit(model, data)
        return {n: t.clone() for n, t in model.trained_state().items()}

    measured = train()
    nothing: dict[str, Any] = {"client_peak_bytes": 0, "client_forward_bytes": 1}
    monkeypatch.setattr(PeakMemoryMonitor, "on_train_start", lambda self, *_: self.report.update(nothing))
    unmeasured = train()
    assert all(torch.equal(measured[n], unmeasured[n]) for n in measured)


class Attention(nn.Module):
    """Nothing but attention of the tokens to each other."""

    inputs = ("tokens",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.scale * tokens, tokens, tokens)


def test_attention_counts_and_rounds_that_differ_count_by_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward in a quarter of the rounds, five in the others, by a clock that goes with the forwards."""
    half, clock = Attention(), [0.0]
    monkeypatch.setattr(peak_memory_monitor.time, "perf_counter", lambda: clock[0])
    batch = {"tokens": torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))}

    def work(forwards: int) -> None:
        for _ in range(forwards):
            half(batch["tokens"])
            clock[0] += 1.0

    class TwoKinds:
        """In the place of a `Rehearsal`: rounds with one answer of the client, and rounds with two."""

        algorithm = SimpleNamespace(kinds_of_round=lambda: [(0, 0.25), (3, 0.75)])

        def autocast(self) -> Any:
            return nullcontext()

        def undone(self) -> Any:
            return nullcontext()

        def round(self, around: Around, round: int = 0) -> None:
            for forwards in {0: [1], 3: [1, 4]}[round]:
                work(3)  # the server's, which is not the client's
                with around(StepRequest(round, 0)):
                    work(forwards)

    rehearsal: Any = TwoKinds()
    assert measure_compute(rehearsal, half, batch) == {"client_forwards": 4.0, "client_seconds": 4.0}


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_backward_costs_two_forwards_however_many_groups_a_convolution_has(groups: int, kind: Any) -> None:
    layer, x = kind(16, 16, 3, padding=1, groups=groups), torch.ones(2, 16, 8, 8, requires_grad=True)
    forward = flops_of(lambda: layer(x), x.device)
    assert forward == 2 * 9 * 16 * 16 // groups * 2 * 64
    assert flops_of(lambda: layer(x).sum().backward(), x.device) == 3 * forward
    assert flops_of(lambda: layer(x.detach()).sum().backward(), x.device) == 2 * forward
