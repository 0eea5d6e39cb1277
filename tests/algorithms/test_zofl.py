"""ZO-FL against plain PyTorch whose clients really walk; scalars alone travel."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from hosfl_lightning import SplitCausalLM
from hosfl_lightning.algorithms import ZOFL
from hosfl_lightning.availability import Trace
from hosfl_lightning.callbacks import PeakMemoryMonitor
from hosfl_lightning.clients import ObjectiveClient
from hosfl_lightning.optim import SGD, AdamW
from hosfl_lightning.server import Call
from hosfl_lightning.server.catch_up import CatchUp
from hosfl_lightning.wire import Codecs, ProjectedGradients, StepRequest
from tests.algorithms.fake_fleet import LonelyServer
from tests.algorithms.plain_probes import MU, RULES, central, drawn, expanded, moved, nats, points, step
from tests.algorithms.two_layers import Points, TwoLayers, assert_equal, last_update, orchestrator, plain
from tests.random_tokens import RandomTokens

PROBES = 3


def forward(net: nn.Module, batch: dict[str, Tensor], round: int, probe: int) -> Tensor:
    theta = list(net.parameters())
    with torch.no_grad():
        base = nats(net, batch).double()
    with moved(theta, drawn(theta, round, probe), MU):
        return ((nats(net, batch).double() - base) / MU).float()


def two_sided(net: nn.Module, batch: dict[str, Tensor], round: int, probe: int) -> Tensor:
    return central(lambda: nats(net, batch), list(net.parameters()), round, probe)


def test_a_client_that_hides_its_loss_is_refused() -> None:
    """Nobody else knows it, and the round's is the mean of them."""
    basis = ZOFL(PROBES).basis(0, 0, []).describe()

    def script(request: StepRequest) -> ProjectedGradients:
        loss = None if request.client == 1 else 1.5
        values = torch.full((PROBES,), 0.1)
        return ProjectedGradients(0, request.client, basis, values, 2, loss=loss, num_examples=2)

    lonely = LonelyServer(ZOFL(PROBES, client_optimizer=SGD(lr=0.1)), script, TwoLayers(client_holds="whole"))
    outcome = lonely.round(Call(0, [0, 1, 2], [0, 1, 2]))
    assert lonely.fleet.refused == {1: "it does not say its loss, which nobody else knows"}
    assert lonely.recorded[0][0].participants == [0, 2]
    assert (float(outcome.loss), outcome.num_examples) == (1.5, 4)


ESTIMATORS = {"forward": forward, "central": two_sided}


def walking(first: nn.Module, second: nn.Module, sampled: list[list[int]], steps: int, estimator: str) -> float:
    """Every client's own copy walks with torch's SGD; whole vectors are averaged. The last round's training loss."""
    data, shared = points(), nn.Sequential(first, second)
    for round, clients in enumerate(sampled):
        nets, seen, losses = [], [], []
        for k in clients:
            net = copy.deepcopy(shared)
            theta, count = list(net.parameters()), 0
            optimizer = torch.optim.SGD(theta, lr=0.2)
            for s in range(steps):
                batch = data.client_batch(k, round * steps + s)
                probes = range(s * PROBES, (s + 1) * PROBES)
                losses.append(float(nats(net, batch).detach()) * len(batch["labels"]))
                values = [ESTIMATORS[estimator](net, batch, round, p) for p in probes]
                step(optimizer, theta, expanded(theta, values, round, first=s * PROBES))
                count += len(batch["labels"])
            nets.append(net)
            seen.append(count)
        with torch.no_grad():
            for p, *given in zip(shared.parameters(), *(net.parameters() for net in nets), strict=True):
                p.copy_(sum((q * n for q, n in zip(given, seen)), torch.zeros(())) / sum(seen))
    return sum(losses) / sum(seen)


@pytest.mark.parametrize(("steps", "estimator"), [(1, "forward"), (3, "forward"), (2, "central")])
def test_scalars_are_the_mean_of_the_clients_walks(tmp_path: Path, steps: int, estimator: str) -> None:
    model = TwoLayers(client_holds="whole")
    first, second = plain(model)
    algorithm = ZOFL(PROBES, MU, estimator, client_optimizer=RULES["sgd"][0], local_steps=steps)
    trainer = orchestrator(algorithm, tmp_path, simulation="per_client" if steps == 3 else "batched")
    trainer.fit(model, Points())
    loss = walking(first, second, [trainer.sample(r) for r in range(5)], steps, estimator)
    assert_equal(model, first, second, 2e-5)
    tolerance = 1e-5 if estimator == "forward" else 1e-2  # the mean over both sides
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(loss, abs=tolerance)


def test_any_rule_with_one_step(tmp_path: Path) -> None:
    model = TwoLayers(client_holds="whole")
    first, second = plain(model)
    trainer = orchestrator(ZOFL(PROBES, MU, client_optimizer=RULES["adamw"][0]), tmp_path)
    trainer.fit(model, Points())
    data, net = points(), nn.Sequential(first, second)
    theta = list(net.parameters())
    optimizer = RULES["adamw"][1](theta)
    for round in range(5):
        batches = [data.client_batch(k, round) for k in trainer.sample(round)]
        total = sum(len(b["labels"]) for b in batches)
        values = [sum(forward(net, b, round, p) * len(b["labels"]) / total for b in batches) for p in range(PROBES)]
        step(optimizer, theta, expanded(theta, values, round))  # type: ignore[arg-type]
    assert_equal(model, first, second, 2e-5)


def test_scalars_up_and_scalars_down(tmp_path: Path) -> None:
    sizes = {}
    for steps in (1, 4):
        algorithm = ZOFL(2, local_steps=steps)
        trainer = orchestrator(algorithm, tmp_path, max_rounds=1)
        trainer.fit(TwoLayers(client_holds="whole"), Points())
        ledger = trainer.fleet.channel.ledger
        sent = Counter((entry.kind, entry.direction, entry.client) for entry in ledger)
        up = {("projected_gradients", "up", k): 1 for k in trainer.sample(0)}
        asked = {("step_request", "down", k): 1 for k in trainer.sample(0)}
        assert sent == Counter({**up, **asked, ("update", "down", None): 1})
        sizes[steps] = max(entry.bytes for entry in ledger if entry.direction == "up")
        monitor = next(c for c in trainer.callbacks if isinstance(c, PeakMemoryMonitor))
        assert monitor.report["server_peak_bytes"] == 0
        # A forward of the whole model is 30·3 + 18·3 multiplications for the 30·3 of the client half.
        assert monitor.report["client_forwards"] == pytest.approx(steps * (2 + 1) * 48 / 30)
    assert 0 <= sizes[4] - sizes[1] - 4 * 2 * 3 <= 8


def test_a_client_that_was_away_is_as_if_it_never_was(tmp_path: Path) -> None:
    trainer = orchestrator(
        ZOFL(2, MU, client_optimizer=SGD(lr=0.2), local_steps=2), tmp_path, logger=True, clients_per_round=2,
        availability=Trace([[0, 1, 2, 3], [0, 1], [1, 3], [0, 2, 3], [0, 1, 2, 3]]), catch_up=CatchUp("replay"),
    )  # fmt: skip
    trainer.fit(TwoLayers(client_holds="whole"), Points())  # which compares the bits
    history = trainer.run.history
    assert history is not None
    assert history.absentees is not None
    assert history.absentees.chosen["replay"] == 4


def test_a_client_whose_loss_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, calls = ObjectiveClient.objective, Counter[str]()

    def poisoned(self: ObjectiveClient, batch: dict[str, Tensor]) -> Tensor:
        calls["all"] += 1
        return objective(self, batch) * (torch.nan if len(batch["labels"]) == 2 else 1)  # client 1

    monkeypatch.setattr(ObjectiveClient, "objective", poisoned)
    algorithm = ZOFL(PROBES, MU, client_optimizer=SGD(lr=0.2), local_steps=2)
    trainer = orchestrator(algorithm, tmp_path, clients_per_round=4, max_rounds=2)
    model = TwoLayers(client_holds="whole")
    with pytest.warns(UserWarning, match="client 1 is refused: projected_gradients: loss has a number that is NaN"):
        trainer.fit(model, Points())
    assert last_update(trainer).participants == [0, 2, 3]
    assert trainer.run.refused == {1: 2}
    assert all(torch.isfinite(tensor).all() for tensor in model.trained_state().values())


def test_a_language_model_learns_and_asks_for_no_gradient(
    tmp_path: Path, tiny_folder: Path, data: RandomTokens
) -> None:
    model = SplitCausalLM(str(tiny_folder), cut=2, client_holds="whole")
    trainer = orchestrator(ZOFL(4, client_optimizer=SGD(lr=2e-3)), tmp_path, clients_per_round=None, max_rounds=1)
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    wanted: list[bool] = []

    class Watches(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            walk = trainer.endpoint.walk
            trainer.endpoint.walk = lambda request: (
                wanted.append(any(p.requires_grad for p in model.parameters())) or walk(request)
            )

    trainer.callbacks.append(Watches())
    trainer.fit(model, data)
    assert wanted == [False] * 3
    assert all(p.requires_grad for p in model.whole.parameters())  # as they were found
    assert any((start[name] != tensor).any() for name, tensor in model.trained_state().items() if "server" in name)


class TestRefusals:
    def test_a_client_that_holds_half_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"ZOFL trains the whole model .*client_holds is half"):
            orchestrator(ZOFL(), tmp_path).fit(TwoLayers(), Points())

    def test_a_codec(self, tmp_path: Path) -> None:
        trainer = orchestrator(ZOFL(), tmp_path, codec=Codecs(smashed_data="int8"))
        with pytest.raises(ValueError, match=r"trainer.codec: ZOFL .* no smashed data"):
            trainer.fit(TwoLayers(client_holds="whole"), Points())

    @pytest.mark.parametrize("rule", [AdamW(), SGD(momentum=0.9), SGD(weight_decay=0.1)])
    def test_walks_that_do_not_add_up(self, rule: Any) -> None:
        ZOFL(client_optimizer=rule)
        with pytest.raises(ValueError, match=r"ZOFL with local_steps=2 .* plain SGD only; set client_optimizer"):
            ZOFL(client_optimizer=rule, local_steps=2)

    @pytest.mark.parametrize(("steps", "probes"), [(0, 2), (2049, 2)])
    def test_local_steps_out_of_range(self, steps: int, probes: int) -> None:
        with pytest.raises(ValueError, match=f"local_steps must be between 1 and 2048.*got {steps}"):
            ZOFL(probes, local_steps=steps)

    def test_several_processes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"trainer.devices: the clients of ZOFL run one after the other"):
            orchestrator(ZOFL(), tmp_path, devices=2).fit(TwoLayers(client_holds="whole"), Points())
