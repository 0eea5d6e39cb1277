"""HOSL against plain PyTorch, against HO-SFL, and in the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import HOSL, SplitFedSGD
from hosfl_lightning.callbacks import LagrangianUpdate, PeakMemoryMonitor
from hosfl_lightning.clients import ForwardOnlyClient
from hosfl_lightning.optim import SGD
from hosfl_lightning.server.server import Server
from hosfl_lightning.split import Lora, LoraHalf
from hosfl_lightning.wire import Codecs, SmashedData
from tests.algorithms.plain_probes import MU, RULES, central, expanded, minibatches, nats, points, step
from tests.algorithms.two_layers import Points, TwoLayers, assert_equal, last_update, orchestrator, plain, sgd
from tests.random_tokens import RandomTokens

PROBES = 3


def reference(first: nn.Module, second: nn.Module, sampled: list[list[int]], rule: str) -> None:
    data, theta, both = points(), list(first.parameters()), nn.Sequential(first, second)
    client, server = RULES[rule][1](theta), torch.optim.SGD(second.parameters(), lr=0.2)
    for round, clients in enumerate(sampled):
        batches = minibatches(data, clients, round)
        server.zero_grad()
        values = torch.zeros(PROBES)
        for batch, w in batches:
            (w * torch.nn.functional.cross_entropy(second(first(batch["points"]).detach()), batch["labels"])).backward()
            for p in range(PROBES):
                values[p] += w * central(partial(nats, both, batch), theta, round, p)
        gradient = expanded(theta, list(values), round)
        server.step()
        step(client, theta, gradient)


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_an_independent_implementation(tmp_path: Path, rule: str, simulation: Any) -> None:
    model = TwoLayers(sgd())
    first, second = plain(model)
    algorithm = HOSL(PROBES, MU, client_optimizer=RULES[rule][0])
    trainer = orchestrator(algorithm, tmp_path, simulation=simulation)
    trainer.fit(model, Points())
    reference(first, second, [trainer.sample(r) for r in range(5)], rule)
    assert_equal(model, first, second, 2e-5)


def first_values(algorithm: HOSFL | HOSL, folder: Path) -> Tensor:
    trainer = orchestrator(algorithm, folder, max_rounds=1)
    trainer.fit(TwoLayers(sgd()), Points())
    update = last_update(trainer)
    assert update.mu == algorithm.mu
    return update.coefficients


@pytest.mark.filterwarnings("ignore:the two sides of a probe")
def test_values_are_those_of_the_multiplier_to_the_second_order(tmp_path: Path) -> None:
    differences = []
    for mu in (2**-4, 2**-5):
        ours = first_values(HOSL(16, mu), tmp_path)
        theirs = first_values(HOSFL(16, mu, estimator="central"), tmp_path)
        assert ours.norm() > 0.1
        differences.append(float((ours - theirs).norm()))
    assert differences[0] < 0.02 * float(ours.norm())
    assert 3.5 < differences[0] / differences[1] < 4.5


def test_both_sides_of_every_probe_go_up_and_no_scalar_does(tmp_path: Path) -> None:
    trainer = orchestrator(HOSL(PROBES), tmp_path, max_rounds=1)
    trainer.fit(TwoLayers(sgd()), Points())
    clients = trainer.sample(0)
    sent = Counter((entry.kind, entry.direction, entry.client) for entry in trainer.fleet.channel.ledger)
    up = {("smashed_data", "up", k): 1 for k in clients} | {("probed_data", "up", k): 2 * PROBES for k in clients}
    asked = {("step_request", "down", k): 1 for k in clients} | {
        ("probe_request", "down", k): 2 * PROBES for k in clients
    }
    assert sent == Counter({**up, **asked, ("update", "down", None): 1})


def report(trainer: Orchestrator) -> dict[str, float]:
    return next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor)).report


def test_a_client_needs_inference_memory_and_two_forwards_a_probe(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    data = RandomTokens([[48] * 4, [48] * 4])
    reports = []
    for algorithm in (HOSL(PROBES), SplitFedSGD(SGD())):
        trainer = make_orchestrator(algorithm, max_rounds=1)
        trainer.fit(make_model(), data)
        reports.append(report(trainer))
    ours, first_order = reports
    inference = ours["client_forward_bytes"] - ours["client_static_bytes"]
    z = 4 * 48 * 32 * 4
    # Packed directions, saved bits and one leaf's fp32; λ never comes, and z is gone when the probes begin.
    assert inference <= ours["client_peak_bytes"] - ours["client_static_bytes"] <= inference + z // 2
    assert 2 * inference < first_order["client_peak_bytes"] - first_order["client_static_bytes"]
    assert ours["client_waiting_bytes"] == 0
    assert ours["client_forwards"] == pytest.approx(2 * PROBES + 1)


def test_the_server_evaluates_probes_without_dropout_or_graph_and_moves_once(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens
) -> None:
    server = LoraHalf(r=2, dropout=0.5, target_modules=["o_proj"])
    model = make_model(lora=Lora(client=LoraHalf(r=2, target_modules=["o_proj"]), server=server))
    seen: list[tuple[bool, bool]] = []
    moved: list[float] = []

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        dropout = any(m.training for m in model.modules() if isinstance(m, nn.Dropout))
        seen.append((dropout, torch.is_grad_enabled()))
        moved.append(sum(float(p.detach().double().abs().sum()) for p in model.server_parameters.values()))
        return SplitCausalLM.training_step(model, batch, batch_idx)

    model.training_step = training_step  # type: ignore[method-assign]
    make_orchestrator(HOSL(2, client_optimizer=SGD(lr=0.1)), max_rounds=2).fit(model, data)
    one, a_round = ([(True, True)] + [(False, False)] * (2 * 2 * clients) for clients in (1, 3))
    measured = [*one, *one, (False, True), *one, *one]  # a client's memory, the server's, a client's cost
    assert seen == [*measured, *a_round, *a_round]
    assert len(set(moved[: -len(a_round)])) == 1
    assert len(set(moved[-len(a_round) :])) == 1
    assert moved[0] != moved[-1]


def test_a_client_whose_losses_are_no_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Server.loss

    def poisoned(self: Server, message: SmashedData) -> Tensor:
        return loss(self, message) * (torch.nan if message.client == 2 else 1)

    monkeypatch.setattr(Server, "loss", poisoned)
    algorithm = HOSL(PROBES)
    trainer = orchestrator(algorithm, tmp_path, clients_per_round=4, max_rounds=1)
    with pytest.warns(UserWarning, match="client 2 is refused: coefficient 0 is nan"):
        trainer.fit(TwoLayers(sgd()), Points())
    update = last_update(trainer)
    assert update.participants == [0, 1, 3]


def test_a_client_whose_probe_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = ForwardOnlyClient.probe

    def poisoned(self: ForwardOnlyClient, batch: Any, basis: Any, number: int, scale: float) -> Tensor:
        z = probe(self, batch, basis, number, scale)
        if number == 1 and scale < 0 and len(z) == 11:  # not in the rehearsal, which has one client
            z[-1] = torch.inf
        return z

    monkeypatch.setattr(ForwardOnlyClient, "probe", poisoned)
    algorithm = HOSL(PROBES)
    trainer = orchestrator(algorithm, tmp_path, clients_per_round=4, max_rounds=1)
    with pytest.warns(UserWarning, match="client 3 is refused: probed_data"):
        trainer.fit(TwoLayers(sgd()), Points())
    update = last_update(trainer)
    assert update.participants == [0, 1, 2]
    sent = Counter(entry.client for entry in trainer.fleet.channel.ledger if entry.kind == "probed_data")
    assert sent == {0: 6, 1: 6, 2: 6, 3: 4}  # what comes after is not asked for


def test_a_client_without_a_loss_term_is_not_asked(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    algorithm = HOSL(2)
    trainer = make_orchestrator(algorithm, max_rounds=1)
    trainer.fit(make_model(), RandomTokens([[9, 12], [1, 1], [7]]))
    assert {entry.client for entry in trainer.fleet.channel.ledger if entry.kind == "probed_data"} == {0, 2}
    update = last_update(trainer)
    assert dict(zip(update.participants, update.weights))[1] == 0
    assert torch.isfinite(update.coefficients).all()


def test_what_a_codec_rounds_is_in_the_losses(tmp_path: Path) -> None:
    values = {}
    for codec in ("fp32", "bf16"):
        algorithm = HOSL(PROBES, mu=2**-4)
        trainer = orchestrator(algorithm, tmp_path, max_rounds=1, codec=Codecs(smashed_data=codec))
        trainer.fit(TwoLayers(sgd()), Points())
        values[codec] = last_update(trainer).coefficients
    assert 1e-5 < float((values["bf16"] - values["fp32"]).norm()) < 0.2


def test_another_methods_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="HOSL has no step for LagrangianUpdate"):
        orchestrator(HOSL(), tmp_path, callbacks=[LagrangianUpdate()])
