"""MU-SplitFed against plain PyTorch; what travels; what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hosfl_lightning.algorithms import MUSplitFed
from hosfl_lightning.optim import SGD
from hosfl_lightning.rng import Domain, Stream, direction
from hosfl_lightning.server import Server
from tests.algorithms.plain_probes import MU, RULES, minibatches, moved, nats, points, step
from tests.algorithms.two_layers import Points, TwoLayers, assert_equal, orchestrator, plain

PROBES, TAU, ETA = 2, 3, 0.3


def drawn(parameters: Sequence[nn.Parameter], round: int, client: int, probe: int, first: int) -> list[Tensor]:
    """A client's own Gaussian direction."""
    stream = Stream(0, Domain.GAUSS16, round=round, client=client, probe=probe, first_tensor=first)
    return [direction(stream, i, 0, p.numel()).view_as(p) for i, p in enumerate(parameters)]


def gradient(loss: Callable[[], Tensor], theta: Sequence[nn.Parameter], directions: list[list[Tensor]]) -> list[Tensor]:
    """``(1/P) Σ_p v_p u_p`` of central differences."""
    total = [torch.zeros_like(p) for p in theta]
    for u in directions:
        sides = []
        for scale in (MU, -MU):
            with moved(theta, u, scale):
                sides.append(loss().double())
        for t, d in zip(total, u):
            t += ((sides[0] - sides[1]) / (2 * MU)).float() * d / len(directions)
    return total


def reference(first: nn.Module, second: nn.Module, sampled: list[list[int]], rules: tuple[str, str]) -> list[float]:
    """Copies of both halves for each client; the losses of the rounds."""
    data, told = points(), []
    halves = [list(first.parameters()), list(second.parameters())]
    below, above = halves
    for round, clients in enumerate(sampled):
        start = [[p.detach().clone() for p in half] for half in halves]
        sums, total = [[torch.zeros_like(p) for p in half] for half in halves], 0.0
        for client, (batch, w) in zip(clients, minibatches(data, clients, round)):
            z = first(batch["points"]).detach()
            server = RULES[rules[1]][1](above)
            for t in range(TAU):
                u = [drawn(above, round, client, t * PROBES + p, len(below)) for p in range(PROBES)]
                step(server, above, gradient(lambda: nats(second, {**batch, "points": z}), above, u))  # noqa: B023
            both, seen = nn.Sequential(first, second), list[float]()

            def loss() -> Tensor:
                seen.append(float(value := nats(both, batch)))  # noqa: B023
                return value

            u = [drawn(below, round, client, p, 0) for p in range(PROBES)]
            step(RULES[rules[0]][1](below), below, gradient(loss, below, u))
            total += w * sum(seen) / len(seen)
            for half, was, summed in zip(halves, start, sums):
                for p, s, m in zip(half, was, summed):
                    m += w * (p.detach() - s)
                    p.data.copy_(s)
        for half, was, summed in zip(halves, start, sums):
            for p, s, m in zip(half, was, summed):
                p.data.copy_(s + ETA * m)
        told.append(total)
    return told


def method(rules: tuple[str, str] = ("sgd", "sgd"), **settings: Any) -> MUSplitFed:
    return MUSplitFed(
        PROBES, MU, server_steps=TAU, global_lr=ETA, client_optimizer=RULES[rules[0]][0],
        server_optimizer=RULES[rules[1]][0], **settings,
    )  # fmt: skip


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("server", ["sgd", "adamw"])
def test_equals_an_independent_implementation(tmp_path: Path, server: str, simulation: Any) -> None:
    model = TwoLayers()
    first, second = plain(model)
    trainer = orchestrator(method(("sgd", server)), tmp_path, simulation=simulation)
    losses: list[float] = []
    call = trainer.call

    def telling(hook: str, **kwargs: Any) -> None:
        if hook == "on_train_batch_end":
            losses.append(float(kwargs["outputs"]["loss"]))
        call(hook, **kwargs)

    trainer.call = telling  # type: ignore[method-assign]
    trainer.fit(model, Points())
    expected = reference(first, second, [trainer.sample(r) for r in range(5)], ("sgd", server))
    assert_equal(model, first, second, 2e-5)
    assert losses == pytest.approx(expected, rel=1e-4)


def test_nobody_backpropagates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "backward", None)
    orchestrator(method(), tmp_path).fit(TwoLayers(), Points())


def test_what_travels(tmp_path: Path) -> None:
    """Weights both ways, 2P + 1 z up, a request for each probe and P scalars down."""
    trainer = orchestrator(method(), tmp_path, max_rounds=1)
    trainer.fit(TwoLayers(), Points())
    sent = Counter((entry.kind, entry.direction) for entry in trainer.fleet.channel.ledger)
    assert sent == {
        ("weights", "down"): 3, ("smashed_data", "up"): 3, ("probe_request", "down"): 3 * 2 * PROBES,
        ("probed_data", "up"): 3 * 2 * PROBES, ("projected_gradients", "down"): 3, ("weights", "up"): 3,
        ("round_end", "down"): 1,
    }  # fmt: skip


def test_the_server_moves_between_the_first_z_and_the_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """τ times, on the first z; what comes down is measured at the θ_s after it."""
    seen: list[Tensor] = []
    loss = Server.loss

    def watching(self: Server, message: Any) -> Tensor:
        seen.append(next(iter(self.module.server_parameters.values())).detach().clone())
        return loss(self, message)

    monkeypatch.setattr(Server, "loss", watching)
    model = TwoLayers()
    start = next(iter(model.server_parameters.values())).detach().clone()
    trainer = orchestrator(method(), tmp_path, clients_per_round=1, max_rounds=1, callbacks=[])
    trainer.fit(model, Points())
    own = seen[-(TAU + 1) * 2 * PROBES :]  # the rehearsals come before
    assert all(not torch.equal(at, start) for at in own[-2 * PROBES :])
    assert len({tuple(at.flatten().tolist()) for at in own[-2 * PROBES :]}) == 1


def test_a_round_that_breaks_off_leaves_both_halves_as_they_were(tmp_path: Path) -> None:
    model = TwoLayers()
    start = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    trainer = orchestrator(method(), tmp_path, min_clients=3, callbacks=[])

    def objecting(message: Any) -> str | None:
        return "it is not liked" if message.client == trainer.server.call.clients[-1] else None

    model.objection = objecting  # type: ignore[method-assign]
    trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "PeakMemoryMonitor"]
    with pytest.warns(UserWarning, match="it is not liked"), pytest.raises(RuntimeError, match="2 valid answer"):
        trainer.fit(model, Points())
    for name, tensor in model.trained_state().items():
        assert torch.equal(tensor, start[name])


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"server_steps": 0}, "server_steps"), ({"global_lr": 0.0}, "global_lr"), ({"probes": 0}, "probes"),
     ({"probes": 64, "server_steps": 65}, "server_steps must be between 1 and 64")],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MUSplitFed(**settings)


def test_the_papers_settings() -> None:
    made = MUSplitFed()
    assert (made.probes, made.server_steps, made.global_lr, made.distribution) == (1, 2, 0.3, "gauss16")
    assert made.server_optimizer == SGD(lr=0.01)
    assert partial(MUSplitFed, client_optimizer=SGD(lr=0.005))().client_optimizer.lr == 0.005
