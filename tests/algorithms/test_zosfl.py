"""ZO-SFL against plain PyTorch and against the same without a cut; nobody backpropagates."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning import HOSFL
from hosfl_lightning.algorithms import ZOFL, ZOSFL
from hosfl_lightning.callbacks import PeakMemoryMonitor
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.server.server import Server
from hosfl_lightning.wire import SmashedData
from tests.algorithms.plain_probes import MU, RULES, central, expanded, minibatches, nats, points, step
from tests.algorithms.two_layers import Points, TwoLayers, assert_equal, last_update, orchestrator, plain

PROBES = 3


def reference(first: nn.Module, second: nn.Module, sampled: list[list[int]], rules: tuple[str, str]) -> None:
    """The whole model as one vector, whose first part has one optimizer and whose second part another."""
    data, both = points(), nn.Sequential(first, second)
    theta, cut = list(both.parameters()), len(list(first.parameters()))
    client, server = RULES[rules[0]][1](theta[:cut]), RULES[rules[1]][1](theta[cut:])
    for round, clients in enumerate(sampled):
        values = torch.zeros(PROBES)
        for batch, w in minibatches(data, clients, round):
            for p in range(PROBES):
                values[p] += w * central(partial(nats, both, batch), theta, round, p)
        gradient = expanded(theta, list(values), round)
        step(client, theta[:cut], gradient[:cut])
        step(server, theta[cut:], gradient[cut:])


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("rules", [("sgd", "adamw"), ("adamw", "sgd")])
def test_equals_an_independent_implementation(tmp_path: Path, rules: tuple[str, str], simulation: Any) -> None:
    model = TwoLayers()
    first, second = plain(model)
    algorithm = ZOSFL(PROBES, MU, client_optimizer=RULES[rules[0]][0], server_optimizer=RULES[rules[1]][0])
    trainer = orchestrator(algorithm, tmp_path, simulation=simulation)
    trainer.fit(model, Points())
    reference(first, second, [trainer.sample(r) for r in range(5)], rules)
    assert_equal(model, first, second, 2e-5)


def test_equals_the_same_without_a_cut(tmp_path: Path) -> None:
    """One direction of the whole model, whoever holds which part of it; losses and schedules included."""
    states, losses = [], []
    for kind in (ZOSFL, ZOFL):
        settings: dict[str, Any] = {"estimator": "central"} if kind is ZOFL else {}
        algorithm = kind(PROBES, MU, client_optimizer=SGD(lr=0.2, momentum=0.9), client_scheduler=halved, **settings)
        model, trainer = TwoLayers(client_holds="whole"), orchestrator(algorithm, tmp_path)
        trainer.fit(model, Points())
        states.append(model.trained_state())
        losses.append(trainer.callback_metrics["train/loss"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda round: 0.5**round)


def test_nobody_backpropagates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward")

    for name in ("backward", "grad"):
        monkeypatch.setattr(torch.autograd, name, refuse)
    graphs: list[bool] = []

    class Watched(TwoLayers):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            graphs.append(loss.requires_grad or any(p.grad is not None for p in self.parameters()))
            return loss

    class Unused(torch.optim.SGD):
        step = refuse  # type: ignore[assignment]

    model, trainer = Watched(Unused, lr_scheduler=halved), orchestrator(ZOSFL(PROBES), tmp_path)
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    trainer.fit(model, Points())
    measured = 1 + 4 * 2 * PROBES  # the server's memory; four rounds of a client for its memory and its cost
    assert graphs == [False] * (measured + 5 * 3 * 2 * PROBES)
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(start[name], tensor) for name, tensor in model.trained_state().items())


def test_every_z_is_of_a_probe_and_the_labels_travel_once(tmp_path: Path) -> None:
    trainer = orchestrator(ZOSFL(PROBES), tmp_path, max_rounds=1)
    trainer.fit(TwoLayers(), Points())
    sent = Counter((entry.kind, entry.direction, entry.client) for entry in trainer.fleet.channel.ledger)
    clients, more = trainer.sample(0), 2 * PROBES - 1
    up = {("smashed_data", "up", k): 1 for k in clients} | {("probed_data", "up", k): more for k in clients}
    asked = {("step_request", "down", k): 1 for k in clients} | {("probe_request", "down", k): more for k in clients}
    assert sent == Counter({**up, **asked, ("update", "down", None): 1})


def test_the_server_needs_inference_memory(tmp_path: Path) -> None:
    reports = []
    for algorithm in (ZOSFL(PROBES), HOSFL(PROBES)):
        trainer = orchestrator(algorithm, tmp_path, max_rounds=1)
        trainer.fit(TwoLayers(), Points())
        reports.append(next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor)).report)
    ours, theirs = reports
    assert ours["client_forwards"] == pytest.approx(2 * PROBES)
    assert ours["client_waiting_bytes"] == 0
    assert ours["server_static_bytes"] == theirs["server_static_bytes"]
    assert ours["server_peak_bytes"] < theirs["server_peak_bytes"]


def test_a_client_whose_losses_are_no_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Server.loss

    def poisoned(self: Server, message: SmashedData) -> Tensor:
        return loss(self, message) * (torch.nan if message.client == 2 else 1)

    monkeypatch.setattr(Server, "loss", poisoned)
    algorithm = ZOSFL(PROBES)
    trainer = orchestrator(algorithm, tmp_path, clients_per_round=4, max_rounds=1)
    with pytest.warns(UserWarning, match="client 2 is refused: coefficient 0 is nan"):
        trainer.fit(TwoLayers(), Points())
    assert last_update(trainer).participants == [0, 1, 3]
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_stopped_and_gone_on_is_never_stopped(tmp_path: Path) -> None:
    """Moments and learning rates of both halves."""

    def run(rounds: int, folder: str, **settings: Any) -> dict[str, Tensor]:
        rule = AdamW(lr=0.05)
        algorithm = ZOSFL(PROBES, MU, client_optimizer=rule, client_scheduler=halved)
        trainer = orchestrator(
            algorithm, tmp_path / folder, max_rounds=rounds, logger=True, enable_checkpointing=True,
            val_check_interval=2,
        )  # fmt: skip
        model = TwoLayers()
        trainer.fit(model, Points(), **settings)
        return {name: tensor.clone() for name, tensor in model.trained_state().items()}

    whole = run(4, "whole")
    run(2, "parts")
    [folder] = (tmp_path / "parts").rglob("run.json")
    gone_on = run(4, "parts", ckpt_path=str(folder.parent))
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)


def test_another_rule_at_the_server_is_another_run(tmp_path: Path) -> None:
    settings = [ZOSFL(server_optimizer=rule).settings() for rule in (None, SGD(lr=1e-3), SGD(lr=1e-2), AdamW())]
    assert settings[0] == settings[1]
    assert settings[1] != settings[2]
    assert settings[2] != settings[3]
