"""Clients that keep what they train for themselves: what travels, what moves, and what stays as it was."""

from __future__ import annotations

import json
import math
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hosfl_lightning import HOSFL
from hosfl_lightning.aggregation.update import recorded
from hosfl_lightning.algorithms import Algorithm, SplitFedSGD
from hosfl_lightning.availability import Trace
from hosfl_lightning.clients import PersonalEndpoint
from hosfl_lightning.optim import AdamW
from hosfl_lightning.run.folder import LOG
from hosfl_lightning.run.rebuild import RebuildError
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import ProjectedGradients
from tests.algorithms.plain_probes import MU, drawn, expanded, moved, step
from tests.algorithms.two_layers import FEATURES, WIDTH, Crossing, FirstLayer, Points, SecondLayer, TwoLayers, adamw
from tests.algorithms.two_layers import orchestrator as make_orchestrator

ADAMW = AdamW(lr=0.03, weight_decay=0.1)
METHODS: dict[str, Any] = {
    "forward": lambda **own: HOSFL(3, MU, client_optimizer=ADAMW, **own),
    "jvp": lambda **own: HOSFL(3, estimator="jvp", client_optimizer=ADAMW, **own),
    "first order": lambda **own: SplitFedSGD(ADAMW, **own),
}
methods = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")


class Deeper(TwoLayers):
    """With two weights and two biases at the client, in turn."""

    def load_whole(self, dtype: str, seed: int, **model_kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = FirstLayer()
            first.layer.extend([nn.Linear(WIDTH, WIDTH), nn.Tanh()])
            return nn.ModuleList([first, SecondLayer()])


def fit(algorithm: Algorithm, folder: Path, data: Points | None = None, **settings: Any) -> Any:
    trainer = make_orchestrator(algorithm, folder, **settings)
    trainer.fit(Deeper(adamw()), data or Points())
    return trainer


def held(trainer: Any, client: int) -> dict[str, Tensor]:
    """All of a client's half, by name."""
    trained = {name: p.detach() for name, p in trainer.endpoint.trained.items()}
    return trained | trainer.endpoint.own_parameters().get(client, {})


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestWhatMoves:
    @methods
    def test_one_client_alone_ends_as_one_that_shares(self, method: str, tmp_path: Path) -> None:
        """The same estimates: only the way in which they come is another."""
        data, settings = Points(sizes=[7]), {"clients_per_round": 1}
        shared = fit(METHODS[method](), tmp_path, data, **settings)
        personal = fit(METHODS[method](personal=True), tmp_path, data, **settings)
        assert alike(held(personal, 0), held(shared, 0))
        assert alike(*(one.lightning_module.server_parameters for one in (shared, personal)))
        assert shared.run.result.last.metrics["val/loss"] == personal.run.result.last.metrics["val/loss"]

    @methods
    @pytest.mark.parametrize("personal", [True, "bias"])
    def test_each_client_moves_its_own_by_its_own_estimate(
        self, method: str, personal: bool | str, tmp_path: Path
    ) -> None:
        """As in plain PyTorch; what is shared by the mean of the same estimates."""
        trainer = fit(METHODS[method](personal=personal), tmp_path, max_rounds=4)
        firsts, second = Reference(method, personal, trainer).run(4)
        own = trainer.endpoint.own_parameters()
        assert set(own) == {k for round in range(4) for k in trainer.sample(round)}
        for k, first in firsts.items():
            expected = {f"layer.{n}": p.detach() for n, p in first.named_parameters()}
            torch.testing.assert_close(held(trainer, k), expected, rtol=1e-5, atol=1e-6)
        for a, b in zip(trainer.lightning_module.server_parameters.values(), second.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        mine = {name.rpartition(".")[2] for name in own[0]}
        assert mine == ({"weight", "bias"} if personal is True else {"bias"})
        assert not alike(own[0], own[2])

    def test_the_half_between_clients_is_the_start(self, tmp_path: Path) -> None:
        trainer = fit(METHODS["forward"](personal=True), tmp_path)
        assert alike(trainer.lightning_module.client_parameters, Deeper().client_parameters)

    def test_of_clients_that_never_took_part_nothing_is_kept(self, tmp_path: Path) -> None:
        trainer = fit(METHODS["forward"](personal=True), tmp_path, Points([3] * 1000), clients_per_round=2)
        assert len(trainer.endpoint.own.held) == len(trainer.endpoint.state_dict()["own"]) <= 10
        size = sum(p.numel() for p in trainer.endpoint.trained.values())
        assert sum(t.numel() for _, slots in trainer.endpoint.own.held.values() for held in slots.values()
                   for t in held.values()) <= 10 * 3 * size  # fmt: skip


class Reference:
    """Every client with a first layer of its own, in plain PyTorch; the server's is one."""

    def __init__(self, method: str, personal: bool | str, trainer: Any) -> None:
        self.method, self.trainer, self.data = method, trainer, Points()
        self.data.setup("fit")
        model = Deeper()
        self.second = deepcopy(model.server_half.layer)
        self.firsts = {k: deepcopy(model.client_half.layer) for k in range(self.data.num_clients)}
        self.server = torch.optim.AdamW(self.second.parameters(), lr=0.02, weight_decay=0.1)
        named = {k: dict(first.named_parameters()) for k, first in self.firsts.items()}
        self.own = {k: [p for n, p in one.items() if personal is True or "bias" in n] for k, one in named.items()}
        self.shared = {k: [p for p in one.values() if all(p is not q for q in self.own[k])] for k, one in named.items()}
        # What is shared comes first, and is numbered first in the directions.
        self.ordered = {k: self.shared[k] + self.own[k] for k in named}
        self.rules = {k: [self.rule(self.shared[k]), self.rule(self.own[k])] for k in named}

    @staticmethod
    def rule(parameters: list[Any]) -> torch.optim.Optimizer | None:
        return torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1) if parameters else None

    def run(self, rounds: int) -> tuple[dict[int, Any], Any]:
        for round in range(rounds):
            self.round(round)
        return self.firsts, self.second

    def round(self, round: int) -> None:
        batches = {k: self.data.client_batch(k, round) for k in self.trainer.sample(round)}
        total = sum(len(batch["labels"]) for batch in batches.values())
        self.server.zero_grad()
        estimates: dict[int, list[Tensor]] = {}
        for k, batch in batches.items():
            z = self.firsts[k](batch["points"]).detach().requires_grad_()
            loss, w = F.cross_entropy(self.second(z), batch["labels"]), len(batch["labels"]) / total
            (w * loss).backward()
            assert z.grad is not None
            estimates[k] = self.estimate(k, batch["points"], z.grad / w, round)
        self.server.step()
        for k in batches:
            rule = self.rules[k][1]
            assert rule is not None
            step(rule, self.own[k], estimates[k][len(self.shared[k]) :])
        weights = {k: len(batch["labels"]) / total for k, batch in batches.items()}
        for k, (rule, _) in self.rules.items():
            if rule is not None:
                mean = [sum(w * estimates[c][i] for c, w in weights.items()) for i in range(len(self.shared[k]))]
                step(rule, self.shared[k], mean)  # type: ignore[arg-type]

    def estimate(self, client: int, points: Tensor, multiplier: Tensor, round: int) -> list[Tensor]:
        """``ĝ_k`` of ``⟨λ_k, f_c(x_k; θ_k)⟩``."""
        first, parameters = self.firsts[client], self.ordered[client]
        exact = torch.autograd.grad(first(points), parameters, multiplier)
        if self.method == "first order":
            return list(exact)

        def term() -> Tensor:
            return (multiplier * first(points).detach()).double().sum()

        values, base = [], term()
        for p in range(3):
            u = drawn(parameters, round, p)
            if self.method == "jvp":
                values.append(torch.stack([(g * d).sum() for g, d in zip(exact, u)]).sum())
                continue
            with moved(parameters, u, MU):
                values.append(((term() - base) / MU).float())
        return expanded(parameters, values, round)


class TestWhatTravels:
    @methods
    def test_nothing_of_a_step(self, method: str, tmp_path: Path) -> None:
        crossing = Crossing()
        fit(METHODS[method](personal=True), tmp_path, callbacks=[crossing], simulation="per_client")
        assert Counter(m.kind for m in crossing.up) == {"smashed_data": 15, "acknowledgement": 15}
        assert Counter(m.kind for m in crossing.down) == {"step_request": 15, "multiplier": 15, "round_end": 5}

    def test_where_a_part_is_shared_what_moves_it(self, tmp_path: Path) -> None:
        crossing = Crossing()
        trainer = fit(METHODS["first order"](personal="bias"), tmp_path, callbacks=[crossing])
        gradients = [m for m in crossing.up if isinstance(m, ProjectedGradients)]
        assert {len(m.coefficients) for m in gradients} == {FEATURES * WIDTH + WIDTH * WIDTH}
        assert Counter(m.kind for m in crossing.down)["update"] == 5
        assert trainer.summary["d_client"] == FEATURES * WIDTH + WIDTH * WIDTH + 2 * WIDTH

    def test_the_same_bits_whether_serialised_or_not(self, tmp_path: Path) -> None:
        kinds = ("per_client", "batched")
        one, other = (fit(METHODS["forward"](personal=True), tmp_path, simulation=kind) for kind in kinds)
        assert all(alike(held(one, k), held(other, k)) for k in range(4))


class TestTheLog:
    def test_it_says_who_counted_and_no_more(self, tmp_path: Path) -> None:
        trainer = fit(METHODS["forward"](personal=True), tmp_path, logger=True)
        log, run_id = ReplayLog.read(Path(trainer.log_dir) / LOG), trainer.fleet.channel.run_id
        updates = [recorded(frame, run_id) for frame in log.frames()]
        assert [u.participants for u in updates] == [trainer.sample(round) for round in range(5)]
        assert all(u.coefficients.numel() == 0 and sum(u.weights) == pytest.approx(1) for u in updates)
        assert log.starts[0]["manifest"] == []
        with pytest.raises(RebuildError, match="nothing of the clients' steps is on record, only who counted"):
            trainer.replay(Deeper(), None, trainer.log_dir, str(tmp_path / "out"))

    def test_what_is_shared_can_be_rebuilt(self, tmp_path: Path) -> None:
        trainer = fit(METHODS["forward"](personal="bias"), tmp_path, logger=True, enable_checkpointing=True)
        trainer.replay(Deeper(), None, trainer.log_dir, str(tmp_path / "out"))
        report = json.loads((tmp_path / "out" / "replay.json").read_text())
        assert (report["equal_to"], report["differs_from"]) == (["last.ckpt"], [])

    @pytest.mark.parametrize("personal", [True, "bias"])
    def test_a_client_that_was_away_holds_what_it_held(self, personal: bool | str, tmp_path: Path) -> None:
        """Of what is shared it replays what it missed, as ever."""
        online = Trace([[0, 1, 2, 3], [0, 1], [0, 1], [0, 1, 2, 3], [2, 3]])
        settings: dict[str, Any] = {"availability": online, "clients_per_round": 2, "logger": True}
        trainer = fit(METHODS["forward"](personal=personal), tmp_path, **settings)
        assert bool(trainer.summary["catch_up"]) is (personal == "bias")


class Rarely(SplitFedSGD):
    """Whose first attempt at every odd round comes to nothing, after the clients have answered."""

    def server_round(self, server: Any, fleet: Any, call: Any) -> Any:
        fails, most = call.round % 2 and not call.attempt, server.min_clients
        backward = server.backward

        def before_the_answers(*given: Any) -> Any:
            server.min_clients = 99 if fails else most
            return backward(*given)

        server.backward = before_the_answers
        try:
            return super().server_round(server, fleet, call)
        finally:
            server.min_clients = most
            del server.backward


class TestAttempts:
    @pytest.mark.parametrize("personal", [True, "bias"])
    def test_one_that_does_not_count_leaves_no_trace(self, personal: bool | str, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"on_too_few": "repeat", "max_rounds": 4}
        repeated = fit(Rarely(ADAMW, personal=personal), tmp_path, **settings)
        assert repeated.run.attempts == [0, 1, 0, 1]
        plain = make_orchestrator(SplitFedSGD(ADAMW, personal=personal), tmp_path, max_rounds=4)
        plain.follows = repeated.run.attempts
        plain.fit(Deeper(adamw()), Points())
        for k in range(4):
            assert alike(held(repeated, k), held(plain, k))
        assert repeated.endpoint.own._moved == {}

    @pytest.mark.parametrize("personal", [True, "bias"])
    def test_a_client_without_a_finite_estimate_stays_where_it_is(
        self, personal: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And is named."""
        measured = PersonalEndpoint.measured

        def nan(self: PersonalEndpoint, multipliers: Any) -> Any:
            answers = measured(self, multipliers)
            if multipliers[0].client == 2:
                answers[0].coefficients[:] = math.nan
            return answers

        monkeypatch.setattr(PersonalEndpoint, "measured", nan)
        with pytest.warns(UserWarning, match=r"client 2 is refused: .*(NaN|finite)"):
            trainer = fit(METHODS["jvp"](personal=personal), tmp_path, max_rounds=3)
        assert 2 not in trainer.endpoint.own_parameters()
        assert trainer.run.refused.keys() == {2}
        assert all(theta.isfinite().all() for k in range(4) for theta in held(trainer, k).values())

    @pytest.mark.parametrize("personal", [True, "bias"])
    def test_a_client_without_a_loss_term_does_not_move(self, personal: bool | str, tmp_path: Path) -> None:
        """AdamW's decay would move it."""
        data = Points()
        data.setup("fit")
        data.clients[1] = [{**point, "labels": torch.tensor(-100)} for point in data.clients[1]]
        data.setup = lambda stage: None  # type: ignore[method-assign]
        trainer = make_orchestrator(METHODS["jvp"](personal=personal), tmp_path, clients_per_round=4)
        trainer.fit(Some(adamw()), data)
        assert sorted(trainer.endpoint.own_parameters()) == [0, 2, 3]


class Some(Deeper):
    """A label -100 is none."""

    def count(self, labels: Tensor) -> int:
        return int((labels != -100).sum())
