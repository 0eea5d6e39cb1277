"""Clients of different strength: against plain PyTorch, against each kind alone, and what is refused."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hosfl_lightning import HOSFL
from hosfl_lightning.aggregation import Median
from hosfl_lightning.algorithms import Algorithm, ClientKind, Frozen, MixedHOSFL, SplitFedSGD
from hosfl_lightning.algorithms.mixed import deal
from hosfl_lightning.optim import SGD, Uncompressed
from hosfl_lightning.server import TooFewClientsError
from hosfl_lightning.split import Side
from hosfl_lightning.wire import Codecs
from tests.algorithms.plain_probes import MU, RULES, expanded, minibatches, moved, nats, points, step
from tests.algorithms.plain_probes import drawn as shared
from tests.algorithms.two_layers import Points, TwoLayers, assert_equal, orchestrator, plain
from tests.random_tokens import RandomTokens
from tests.test_round import MakeModel

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe")  # μ is large on purpose

PROBES = 3
PHONE, LAPTOP, STILL = "forward_only", "first_order", "frozen"
#: Clients 0 and 2 probe, 1 backpropagates, 3 is frozen.
MIXED = [
    ClientKind(PHONE, clients=[0, 2], probes=PROBES), ClientKind(LAPTOP, clients=[1]), ClientKind(STILL, clients=[3]),
]  # fmt: skip


def mixed(clients: list[ClientKind], rule: str = "adamw", **settings: Any) -> MixedHOSFL:
    return MixedHOSFL(clients, mu=MU, client_optimizer=RULES[rule][0], **settings)


def reference(first: nn.Module, second: nn.Module, sampled: list[list[int]], rule: str) -> None:
    """One client after the other; each gradient as its client can give it, weighed by who answers."""
    data, below, above = points(), list(first.parameters()), list(second.parameters())
    client, server = RULES[rule][1](below), torch.optim.SGD(above, lr=0.2)
    for round, clients in enumerate(sampled):
        batches = dict(zip(clients, minibatches(data, clients, round)))
        answering = sum(len(b["labels"]) for k, (b, _) in batches.items() if k != 3)
        total, upper = [torch.zeros_like(p) for p in below], [torch.zeros_like(p) for p in above]
        for k, (batch, w) in batches.items():
            z = first(batch["points"])
            lam, *own = torch.autograd.grad(nats(second, {**batch, "points": z}), [z, *above], retain_graph=True)
            for u, g in zip(upper, own):
                u += w * g
            if k == 3:
                continue
            if k == 1:
                gradient: Any = torch.autograd.grad(z, below, lam)
            else:
                values = []
                for p in range(PROBES):
                    with moved(below, shared(below, round, p), MU):
                        there = first(batch["points"])
                    values.append((((there - z) * lam).double().sum() / MU).float().detach())
                gradient = expanded(below, values, round)
            for t, g in zip(total, gradient):
                t += len(batch["labels"]) / answering * g
        step(server, above, upper)
        step(client, below, total)


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_equals_an_independent_implementation(tmp_path: Path, rule: str, simulation: Any) -> None:
    model = TwoLayers()
    first, second = plain(model)
    trainer = orchestrator(mixed(MIXED, rule), tmp_path, simulation=simulation)
    trainer.fit(model, Points())
    sampled = [trainer.sample(r) for r in range(5)]
    assert {k for clients in sampled for k in clients} == {0, 1, 2, 3}
    reference(first, second, sampled, rule)
    assert_equal(model, first, second, 2e-4)


@pytest.mark.parametrize(
    ("kind", "alone"),
    [(ClientKind(PHONE, share=1, probes=PROBES), HOSFL(PROBES, MU, client_optimizer=SGD(lr=0.1))),
     (ClientKind(LAPTOP, share=1), SplitFedSGD(SGD(lr=0.1)))],
)  # fmt: skip
def test_one_kind_is_that_method(kind: ClientKind, alone: Algorithm, tmp_path: Path) -> None:
    states = []
    for algorithm in (MixedHOSFL([kind], mu=MU, client_optimizer=SGD(lr=0.1)), alone):
        model = TwoLayers()
        orchestrator(algorithm, tmp_path).fit(model, Points())
        states.append(model.trained_state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-6)


def test_side_clients_are_those_of_the_local_gradient(make_model: MakeModel, tmp_path: Path) -> None:
    """Alone they are that method; beside them a phone probes the same adapter, and is the one whose μ is looked at."""
    settings: dict[str, Any] = {"cut": 3, "lora": None, "side": Side(4)}
    data, states = RandomTokens([[8] * 4] * 3, batch_size=2), []
    side = ClientKind("side", share=1)
    for algorithm in (
        mixed([side], "sgd"),
        HOSFL(estimator="local", compression=Uncompressed(), client_optimizer=RULES["sgd"][0]),
    ):
        model = make_model(**settings)
        orchestrator(algorithm, tmp_path, max_rounds=2).fit(model, data)
        states.append(model.trained_state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-6)
    kinds = [ClientKind("side", clients=[0]), ClientKind(PHONE, clients=[1, 2], probes=PROBES)]
    both = MixedHOSFL(kinds, mu=10.0, client_optimizer=RULES["sgd"][0])
    with pytest.warns(UserWarning, match="the two sides of a probe"):
        orchestrator(both, tmp_path, max_rounds=1, clients_per_round=3).fit(make_model(**settings), data)


def test_frozen_clients_teach_the_server_alone(tmp_path: Path) -> None:
    """Where only they are sampled nobody answers, which is no round; beside others their weight is the server's."""
    trainer = orchestrator(mixed([ClientKind(STILL, clients=[1, 2, 3]), ClientKind(LAPTOP, clients=[0])]), tmp_path,
                           max_rounds=1, clients_per_round=4)  # fmt: skip
    model, alone = TwoLayers(), TwoLayers()
    trainer.fit(model, Points())
    frozen = orchestrator(Frozen(), tmp_path, max_rounds=1, clients_per_round=4)
    frozen.fit(alone, Points())
    for name, tensor in model.trained_state().items():
        same = torch.allclose(tensor, alone.trained_state()[name], atol=1e-6)
        assert same == name.startswith("server_half"), name
    up = [entry for entry in trainer.fleet.channel.ledger if entry.direction == "up"]
    assert Counter(entry.kind for entry in up) == {"smashed_data": 4, "projected_gradients": 1}


def test_what_each_sent_stands_in_the_ledger(tmp_path: Path) -> None:
    trainer = orchestrator(mixed(MIXED), tmp_path, clients_per_round=4, max_rounds=1)
    trainer.fit(TwoLayers(), Points())
    answers = {e.client: e.bytes for e in trainer.fleet.channel.ledger if e.kind == "projected_gradients"}
    d = sum(p.numel() for p in trainer.endpoint.trained.values())
    assert answers.keys() == {0, 1, 2}
    assert answers[0] == answers[2]
    assert answers[1] - answers[0] > 4 * (d - PROBES) - 100  # four bytes a value, but for the words about the basis
    multipliers = {e.client for e in trainer.fleet.channel.ledger if e.kind == "multiplier"}
    assert multipliers == {0, 1, 2}


class TestDealing:
    def test_shares_are_of_all_clients_and_follow_the_seed(self) -> None:
        kinds = [ClientKind(PHONE, share=0.7), ClientKind(LAPTOP, share=0.3)]
        dealt = deal(kinds, 10, seed=1)
        assert Counter(dealt) == {0: 7, 1: 3}
        assert dealt == deal(kinds, 10, seed=1) != deal(kinds, 10, seed=2)

    def test_numbers_come_first(self) -> None:
        dealt = deal([ClientKind(PHONE, share=1), ClientKind(LAPTOP, clients=[3, 0])], 5, seed=0)
        assert dealt == [1, 0, 0, 1, 0]

    def test_thirds_that_were_written_as_decimals(self) -> None:
        kinds = [ClientKind(PHONE, share=0.1), ClientKind(LAPTOP, share=0.2), ClientKind(STILL, share=0.7)]
        assert Counter(deal(kinds, 10, seed=0)) == {0: 1, 1: 2, 2: 7}

    @pytest.mark.parametrize(
        ("kinds", "named"),
        [([ClientKind(PHONE, share=0.5)], "add up to 0.5"), ([ClientKind(PHONE, clients=[0])], "4 client.s. have no"),
         ([ClientKind(PHONE, clients=[0, 5]), ClientKind(LAPTOP, share=1)], "client 5 is not in 0..4"),
         ([ClientKind(PHONE, clients=[0]), ClientKind(LAPTOP, clients=[0, 1, 2, 3, 4])], "client 0 is named twice")],
    )  # fmt: skip
    def test_what_does_not_cover_everybody_once_is_refused(self, kinds: list[ClientKind], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            deal(kinds, 5, seed=0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [({"kind": "strong", "share": 1}, "kind 'strong'; it must be one of forward_only, side"),
         ({"kind": PHONE}, "needs either a share or clients"),
         ({"kind": PHONE, "share": 0.5, "clients": [1]}, "needs either"),
         ({"kind": PHONE, "share": 0}, "share 0; it must be above 0"),
         ({"kind": LAPTOP, "share": 1, "probes": 2}, "only forward_only probes")],
    )  # fmt: skip
    def test_a_kind(self, settings: dict[str, Any], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            ClientKind(**settings)

    def test_nobody_trains(self) -> None:
        with pytest.raises(ValueError, match="all clients are frozen; take Frozen"):
            MixedHOSFL([ClientKind(STILL, share=1)])

    def test_a_median_of_estimates_and_gradients(self) -> None:
        with pytest.raises(ValueError, match="Median drops what is far from the others"):
            MixedHOSFL(MIXED, aggregation=Median())

    def test_a_side_adapter_that_is_not_there(self, tmp_path: Path) -> None:
        trainer = orchestrator(mixed([ClientKind("side", share=1)]), tmp_path)
        with pytest.raises(ValueError, match="kind 'side' need a side adapter"):
            trainer.fit(TwoLayers(), Points())

    def test_scalars_in_ternary(self) -> None:
        """A phone's answer would be little but signs."""
        ternary = Codecs(gradient="ternary")
        with pytest.raises(ValueError, match=r"trainer\.codec\.gradient: the scalars of forward_only clients"):
            mixed(MIXED).check_codecs(ternary, [1000])
        mixed([ClientKind(LAPTOP, share=1)]).check_codecs(ternary, [1000])

    def test_a_round_of_frozen_clients_alone(self, tmp_path: Path) -> None:
        kinds = [ClientKind(STILL, clients=[0, 1, 2]), ClientKind(LAPTOP, clients=[3])]
        trainer = orchestrator(mixed(kinds), tmp_path, clients_per_round=1)
        with pytest.raises(TooFewClientsError, match=r"all 1 client\(s\) of the round are frozen.*clients_per_round"):
            trainer.fit(TwoLayers(), Points())

    def test_probes_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="probes must be between 1 and 4096"):
            partial(MixedHOSFL, [ClientKind(PHONE, share=1, probes=5000)])()

    def test_an_answer_in_another_kinds_basis(self, tmp_path: Path) -> None:
        """A phone that sends a dense gradient would be taken for a laptop."""
        settings: dict[str, Any] = {"clients_per_round": 4, "max_rounds": 1, "simulation": "per_client"}
        trainer = orchestrator(mixed(MIXED), tmp_path, **settings)
        start = trainer.call

        def swap(hook: str, **kwargs: Any) -> None:
            start(hook, **kwargs)
            if hook == "on_train_start":
                endpoint: Any = trainer.endpoint
                answered = endpoint.answered_in
                endpoint.answered_in = lambda client, round: answered(1 if client == 0 else client, round)
                of = endpoint.engine_of
                endpoint.engine_of = lambda client: of(1 if client == 0 else client)

        trainer.call = swap  # type: ignore[method-assign]
        with pytest.warns(UserWarning, match="client 0 is refused: its answer is in the basis"):
            trainer.fit(TwoLayers(), Points())
