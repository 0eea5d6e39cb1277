"""Clients that send what cannot be used: refused by name, and the round goes on with the others or is not run."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.aggregation import (
    AggregationRule,
    Median,
    NormClippedMean,
    TrimmedMean,
    WeightedMean,
    apply_update,
    combine,
    weights,
)
from hosfl_lightning.algorithms import Algorithm, Frozen, TooFewClientsError
from hosfl_lightning.availability import Probability, Trace
from hosfl_lightning.clients.split_endpoint import SplitEndpoint
from hosfl_lightning.fleet import Channel, channel
from hosfl_lightning.optim import SGD, AdamW, ZerothOrder
from hosfl_lightning.run.divergence import DivergedError
from hosfl_lightning.run.loop import MAX_ATTEMPTS
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import (
    Message,
    Multiplier,
    ProjectedGradients,
    RoundEnd,
    SmashedData,
    StepRequest,
    Update,
    decode,
)
from tests.random_tokens import RandomTokens

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=")

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]
State = dict[str, Tensor]


class Faulty(HOSFL):
    """HO-SFL in which one client sends other scalars than it measured.

    Args:
        client: Which.
        second: What it sends as its second scalar; None: what it measured.
        scale: Of all that it sends.
        rounds: In which; None: all.
    """

    class Lies(SplitEndpoint):
        def answer(self, multipliers: Sequence[Multiplier]) -> list[Message]:
            answers: list[Any] = super().answer(multipliers)
            return [self.spoil(one) if self.lies(one) else one for one in answers]

        def lies(self, answer: ProjectedGradients) -> bool:
            rounds = self.terms.settings["rounds"]
            return answer.client == self.terms.settings["faulty"] and (rounds is None or answer.round in rounds)

        def spoil(self, answer: ProjectedGradients) -> ProjectedGradients:
            values, second = answer.coefficients * self.terms.settings["scale"], self.terms.settings["second"]
            if second is not None:
                values[1:] = float(second)
            return replace(answer, coefficients=values)

    endpoint = Lies

    def __init__(
        self,
        client: int,
        second: float | None = None,
        rounds: list[int] | None = None,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**({"client_optimizer": SGD(lr=0.1)} | kwargs))
        said = None if second is None else str(second)  # NaN is no setting
        self.fault = {"faulty": client, "second": said, "scale": scale, "rounds": rounds}

    def client_settings(self) -> dict[str, Any]:
        return {**super().client_settings(), **self.fault}


class Copies(RandomTokens):
    """All clients hold what client 0 holds."""

    def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
        return super().client_batch(0, round)


def state_of(model: SplitCausalLM) -> State:
    return {name: tensor.clone() for name, tensor in model.trained_state().items()}


def half(state: State, name: str) -> State:
    return {n: t for n, t in state.items() if n.startswith(name)}


def same_bits(a: State, b: State) -> bool:
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def updates(trainer: Orchestrator) -> list[Update]:
    frames = ReplayLog.read(Path(trainer.log_dir) / "updates.log").frames()
    return [decode(frame, "update") for frame in frames]  # type: ignore[misc]


def column(trainer: Orchestrator, name: str) -> list[float]:
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def honest(make_model: MakeModel, make: MakeOrchestrator, data: RandomTokens, clients: list[int], **kw: Any) -> State:
    """Where one round of these clients alone ends."""
    model = make_model()
    availability = Trace([clients])
    make(max_rounds=1, simulation="per_client", availability=availability, **kw).fit(model, data)
    return state_of(model)


@pytest.fixture
def before(make_model: MakeModel) -> State:
    return state_of(make_model())


class TestOneClientIsRefused:
    @pytest.mark.parametrize(
        ("value", "simulation", "reason"),
        [
            (float("nan"), "per_client", "projected_gradients: coefficients has 1 values that are NaN or infinite"),
            (float("-inf"), "batched", "projected_gradients: coefficients has 1 values that are NaN or infinite"),
            (1e9, "batched", r"coefficient 1 is 1e\+09, beyond ±1e\+06"),
        ],
    )
    def test_by_its_scalars(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, value: float,
        simulation: Any, reason: str, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """The round is that of the others, the weights are over those who answered; the server still had its z."""
        model = make_model()
        trainer = make_orchestrator(Faulty(1, value, [0]), max_rounds=2, simulation=simulation)
        with pytest.warns(UserWarning, match=f"round 0: client 1 is refused: {reason}"):
            trainer.fit(model, data)
        first, second = updates(trainer)
        assert (first.participants, second.participants) == ([0, 2], [0, 1, 2])
        terms = [model.count(data.client_batch(k, 0)["labels"]) for k in (0, 2)]
        assert first.weights == weights(terms)
        assert column(trainer, "client/refused") == [1.0, 0.0]
        assert trainer.summary["refused"] == {"1": 1}
        assert "refused messages  client 1 1" in capsys.readouterr().out

    def test_and_what_it_sent_is_counted(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        sizes = []
        for simulation in ("batched", "per_client"):
            trainer = make_orchestrator(Faulty(1, float("nan")), max_rounds=1, simulation=simulation)
            with pytest.warns(UserWarning, match="client 1 is refused"):
                trainer.fit(make_model(), data)
            sizes.append(column(trainer, "comm/projected_gradients_bytes"))
        assert sizes[0] == sizes[1]

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    def test_by_more_loss_terms_than_its_labels_have(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, simulation: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Its weight in the mean would be what it says."""
        up = Channel.up

        def lying(self: Channel, message: Message) -> Message:
            if isinstance(message, ProjectedGradients) and message.client == 1:
                message = replace(message, num_terms=10**6)
            return up(self, message)

        monkeypatch.setattr(Channel, "up", lying)
        trainer = make_orchestrator(max_rounds=1, simulation=simulation)
        with pytest.warns(UserWarning, match="client 1 is refused: it claims 1000000 loss terms, its labels have"):
            trainer.fit(make_model(), data)
        assert [update.participants for update in updates(trainer)] == [[0, 2]]

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            ({"width": 31}, "its smashed data have 31 columns, the cut has 32"),
            ({"width": 32, "labels": 260}, r"its label 260 is neither -100 nor in 0\.\.259"),
            ({"width": 32, "labels": -1}, r"its label -1 is neither -100 nor in 0\.\.259"),
            ({"width": 32, "labels_per_token": False}, "it sent one label a sequence, a causal LM has one a token"),
        ],
    )
    def test_by_smashed_data_of_another_model(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, simulation: Any,
        monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], reason: str,
    ) -> None:  # fmt: skip
        """Sound messages, which the server's forward or its loss cannot take."""
        up = Channel.up

        def other(self: Channel, message: Message) -> Message:
            if isinstance(message, SmashedData) and message.client == 1:
                per_token = fault.get("labels_per_token", True)
                z = torch.zeros(*message.mask.shape, fault["width"])
                shape = message.mask.shape if per_token else message.mask.shape[:1]
                labels = torch.full(shape, fault.get("labels", 5))
                message = SmashedData.pack(message.round, 1, z, labels, message.mask)
            return up(self, message)

        monkeypatch.setattr(Channel, "up", other)
        trainer = make_orchestrator(max_rounds=1, simulation=simulation)
        with pytest.warns(UserWarning, match=f"client 1 is refused: {reason}"):
            trainer.fit(make_model(), data)
        assert [update.participants for update in updates(trainer)] == [[0, 2]]
        assert trainer.summary["refused"] == {"1": 1}

    def test_and_the_update_is_that_of_the_others_bit_for_bit(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens,
        sent: list[tuple[Message, int]],
    ) -> None:  # fmt: skip
        """The others answer to the λ of a round of three, so this is no round of two: it is one answer less."""
        everybody = honest(make_model, make_orchestrator, data, [0, 1, 2])
        answers = [a for a, _ in sent if isinstance(a, ProjectedGradients) and a.client != 1]
        model = make_model()
        trainer = make_orchestrator(Faulty(1, float("nan")), max_rounds=1, simulation="per_client")
        with pytest.warns(UserWarning, match="client 1 is refused"):
            trainer.fit(model, data)
        assert same_bits(half(state_of(model), "server"), half(everybody, "server"))
        assert not same_bits(half(state_of(model), "client"), half(everybody, "client"))
        by_hand = make_model()
        optimizer = ZerothOrder(by_hand.client_parameters.values(), SGD(lr=0.1))
        apply_update(combine(answers, optimizer), optimizer)
        assert same_bits(half(state_of(model), "client"), half(state_of(by_hand), "client"))

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    def test_by_its_smashed_data(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, simulation: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Neither half hears of it and it is sent no λ; of a joint batch the others' λ still meet their own rows."""

        def end(**settings: Any) -> tuple[State, Orchestrator]:
            model, algorithm = make_model(), HOSFL(2, 2**-7, client_optimizer=SGD(lr=0.1))
            trainer = make_orchestrator(algorithm, max_rounds=1, simulation=simulation, **settings)
            trainer.fit(model, data)
            return state_of(model), trainer

        pack = SmashedData.pack.__func__  # type: ignore[attr-defined]

        def with_nan(cls: Any, round: int, client: int, z: Tensor, *args: Any) -> SmashedData:
            return pack(cls, round, client, z.index_fill(0, torch.tensor([0]), torch.nan) if client == 1 else z, *args)

        others, _ = end(availability=Trace([[0, 2]]))
        monkeypatch.setattr(SmashedData, "pack", classmethod(with_nan))
        with pytest.warns(UserWarning, match=r"client 1 is refused: smashed_data: z\.values has .* NaN or infinite"):
            reached, trainer = end()
        tolerance = 0.0 if simulation == "per_client" else 5e-5
        for name, tensor in others.items():
            torch.testing.assert_close(reached[name], tensor, rtol=tolerance, atol=tolerance)
        sent = Counter((entry.kind, entry.receivers) for entry in trainer.fleet.channel.ledger)
        assert sent[("multiplier", 1)] == sent[("projected_gradients", 1)] == 2
        assert sent[("update", 3)] == 1
        assert updates(trainer)[0].participants == [0, 2]
        assert trainer.summary["refused"] == {"1": 1}

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    def test_a_server_whose_loss_is_not_finite_stops_before_anything_moves(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, before: State,
        simulation: Any, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        model, step = make_model(), SplitCausalLM.training_step

        class Breaks(Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                monkeypatch.setattr(SplitCausalLM, "training_step", lambda *args: step(*args) * torch.nan)

        with pytest.raises(DivergedError, match=r"the server half .*\(multiplier: .* NaN or infinite"):
            make_orchestrator(max_rounds=1, simulation=simulation, callbacks=[Breaks()]).fit(model, data)
        assert same_bits(state_of(model), before)

    @pytest.mark.parametrize(
        ("kind", "other", "reason"),
        [
            ("smashed_data", {"run_id": bytes(range(16))}, "expected run_id"),
            ("projected_gradients", {"round": 7}, "expected round 0, got 7"),
            ("smashed_data", {"client": 0}, "expected client 1, got 0"),
            ("projected_gradients", {"client": 0}, "expected client 1, got 0"),
        ],
    )
    def test_by_its_address(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens,
        monkeypatch: pytest.MonkeyPatch, kind: str, other: dict[str, Any], reason: str,
    ) -> None:  # fmt: skip
        encode = channel.encode

        def elsewhere(message: Message, run_id: bytes) -> bytes:
            if message.kind != kind or message.client != 1:  # type: ignore[union-attr]
                return encode(message, run_id)
            changed = {name: value for name, value in other.items() if name != "run_id"}
            return encode(replace(message, **changed), other.get("run_id", run_id))

        monkeypatch.setattr(channel, "encode", elsewhere)
        trainer = make_orchestrator(max_rounds=1, simulation="per_client")
        with pytest.warns(UserWarning, match=f"client 1 is refused: {kind}: {reason}"):
            trainer.fit(make_model(), data)
        assert [update.participants for update in updates(trainer)] == [[0, 2]]


class TestAnAttacker:
    """One of five clients answers with the opposite, a thousand times as large: below the limit, so it is heard."""

    @pytest.mark.filterwarnings("ignore:round .* has grown")
    def test_bends_the_mean_at_will_and_a_robust_rule_hardly(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator
    ) -> None:
        """All five hold the same data, so every rule gives the same where all are honest."""

        def end(algorithm: HOSFL) -> Tensor:
            model = make_model()
            make_orchestrator(algorithm, max_rounds=4, val_check_interval=4).fit(model, Copies([[6, 5]] * 5))
            return torch.cat([p.detach().flatten() for p in model.client_parameters.values()])

        def attacked(rule: AggregationRule) -> Tensor:
            rules: dict[str, Any] = {"client_optimizer": SGD(lr=0.02), "aggregation": rule}
            return end(Faulty(2, scale=-1e3, probes=4, **rules))

        start = torch.cat([p.detach().flatten() for p in make_model().client_parameters.values()])
        honest = end(HOSFL(4, client_optimizer=SGD(lr=0.02)))
        assert torch.equal(attacked(Median()), honest)
        assert torch.equal(attacked(TrimmedMean(0.2)), honest)
        went = (honest - start).norm()
        assert (attacked(NormClippedMean(1.0)) - start).norm() < went
        assert (attacked(WeightedMean()) - honest).norm() > 50 * went


class TestTooFewClients:
    def test_stop_moves_nothing_saves_the_state_and_can_go_on(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        def schedule(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def adam(params: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params, lr=1e-2)

        def method(rounds: list[int]) -> Faulty:
            return Faulty(1, 1e9, rounds, client_optimizer=AdamW(lr=1e-2), client_scheduler=schedule)

        server = {"optimizer": adam, "lr_scheduler": schedule}
        model = make_model(**server)
        trainer = make_orchestrator(method([2]), max_rounds=4, min_clients=3)
        with (
            pytest.warns(UserWarning, match="round 2: client 1 is refused"),
            pytest.raises(TooFewClientsError) as stopped,
        ):
            trainer.fit(model, data)
        path = Path(trainer.log_dir) / "checkpoints" / "stopped.ckpt"
        assert str(stopped.value) == (
            "round 2: 2 valid answer(s) of clients with a loss term, trainer.min_clients is 3, tried 1 time(s); lower "
            "trainer.min_clients or set "
            f"trainer.on_too_few: repeat, and go on from the state before the round with --ckpt_path {path}"
        )
        two = make_model(**server)
        shorter = make_orchestrator(method([]), max_rounds=2)
        shorter.fit(two, data)
        assert same_bits(state_of(model), state_of(two))
        for one_of, other in (
            (trainer.server.optimizer.state_dict(), shorter.server.optimizer.state_dict()),
            (trainer.endpoint.state_dict(), shorter.endpoint.state_dict()),
            (trainer.algorithm.state_dict(), shorter.algorithm.state_dict()),
        ):
            assert str(one_of) == str(other)  # every tensor of moments is small enough to be printed
        assert len(updates(trainer)) == 2

        gone_on, whole = make_model(**server), make_model(**server)
        again = make_orchestrator(method([2]), max_rounds=4, min_clients=2)
        with pytest.warns(UserWarning, match="round 2: client 1 is refused"):
            again.fit(gone_on, data, ckpt_path=str(path))
        with pytest.warns(UserWarning, match="round 2: client 1 is refused"):
            make_orchestrator(method([2]), max_rounds=4).fit(whole, data)
        assert same_bits(state_of(gone_on), state_of(whole))
        assert [update.participants for update in updates(again)] == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2]]
        assert again.summary["refused"] == {"1": 2}

    def test_before_the_server_is_asked(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, before: State
    ) -> None:
        model = make_model()
        trainer = make_orchestrator(availability=Trace([[]]), max_rounds=1)
        with pytest.raises(
            TooFewClientsError,
            match=r"round 0: 0 valid answer\(s\) of clients with a loss term, trainer.min_clients is 1",
        ):
            trainer.fit(model, data)
        assert same_bits(state_of(model), before)

    @pytest.mark.parametrize("simulation", ["batched", "per_client"])
    def test_when_nobody_is_left(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, before: State, simulation: Any
    ) -> None:
        """Its one answer with a loss term is refused: no mean is defined, however many are required."""
        data = RandomTokens([[1, 1], [6, 9]])
        model = make_model()
        trainer = make_orchestrator(Faulty(1, 1e9), max_rounds=1, simulation=simulation)
        with (
            pytest.warns(UserWarning, match="client 1 is refused"),
            pytest.raises(TooFewClientsError, match=r"0 valid answer\(s\)"),
        ):
            trainer.fit(model, data)
        assert same_bits(state_of(model), before)

    def test_repeat_draws_other_clients_and_a_resumed_run_the_same(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator
    ) -> None:
        data = RandomTokens([[5, 4]] * 6, batch_size=2)
        settings: dict[str, Any] = {
            "clients_per_round": 3, "min_clients": 3, "on_too_few": "repeat", "val_check_interval": 6,
            "availability": Probability(0.6),
        }  # fmt: skip

        def run(model: SplitCausalLM, rounds: int, ckpt_path: str | None = None) -> Orchestrator:
            trainer = make_orchestrator(Faulty(4, 1e9), max_rounds=rounds, **settings)
            with pytest.warns(UserWarning, match="client 4 is refused"):
                trainer.fit(model, data, ckpt_path=ckpt_path)
            return trainer

        whole, resumed = make_model(), make_model()
        trainer = run(whole, 6)
        drawn = [update.participants for update in updates(trainer)]
        assert all(len(clients) == 3 and 4 not in clients for clients in drawn)
        assert drawn != [trainer.sample(round) for round in range(6)]
        first = run(make_model(), 3)
        first.save_checkpoint(str(Path(first.log_dir) / "checkpoints" / "three.ckpt"))
        last = run(resumed, 6, first.log_dir)
        assert same_bits(state_of(whole), state_of(resumed))
        assert last.summary["refused"] == trainer.summary["refused"]

    @pytest.mark.parametrize("algorithm", [None, Frozen()])
    def test_clients_without_a_loss_term_are_no_round(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, algorithm: Algorithm | None
    ) -> None:
        data = RandomTokens([[1, 1], [1, 1], [5, 4], [5, 4]])  # one token predicts nothing
        trainer = make_orchestrator(algorithm, max_rounds=4, clients_per_round=1, on_too_few="repeat")
        trainer.fit(make_model(), data)
        accepted = [trainer.sample(round, attempt) for round, attempt in enumerate(trainer.run.attempts)]
        assert max(trainer.run.attempts) > 0
        assert all(clients in ([2], [3]) for clients in accepted)
        stops = make_orchestrator(algorithm, max_rounds=4, clients_per_round=1)
        with pytest.raises(TooFewClientsError, match=r"0 valid answer\(s\) of clients with a loss term"):
            stops.fit(make_model(), data)
        assert (Path(stops.log_dir) / "checkpoints" / "stopped.ckpt").is_file()

    def test_a_repeated_round_is_reported_once_and_the_controls_follow_it(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, sent: list[tuple[Message, int]]
    ) -> None:
        data = RandomTokens([[5, 4]] * 6, batch_size=2)
        settings: dict[str, Any] = {"clients_per_round": 3, "min_clients": 3, "on_too_few": "repeat", "max_rounds": 4}
        trainer = make_orchestrator(Faulty(4, 1e9), controls=["frozen"], simulation="per_client", **settings)
        with pytest.warns(UserWarning, match="client 4 is refused"):
            trainer.fit(make_model(), data)
        assert max(trainer.run.attempts) > 0
        smashed = [(m.round, m.client) for m, _ in sent if isinstance(m, SmashedData)]
        accepted = [(update.round, client) for update in updates(trainer) for client in update.participants]
        assert smashed[-len(accepted) :] == accepted  # the control came last
        attempted = len(set(smashed[: -len(accepted)]))  # a client that was asked again took part in the round once
        total = sum(column(trainer, "comm/smashed_data_bytes"))
        assert trainer.summary["bytes_per_client_round"]["smashed_data"] == total / attempted
        # What the given up attempts have seen is not in the metrics.
        alone = make_orchestrator(Faulty(4, 1e9), simulation="per_client", **settings)
        alone.follows = trainer.run.attempts
        alone.fit(make_model(), data)
        assert column(alone, "client/lagrangian_term") == column(trainer, "client/lagrangian_term")

    def test_repeat_ends(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens, before: State,
        sent: list[tuple[Message, int]],
    ) -> None:  # fmt: skip
        model = make_model()
        trainer = make_orchestrator(
            Faulty(1, 1e9), max_rounds=1, min_clients=2, clients_per_round=2, on_too_few="repeat",
            availability=Trace([[0, 1]]),
        )  # fmt: skip
        with (
            pytest.warns(UserWarning, match="client 1 is refused"),
            pytest.raises(TooFewClientsError, match=r"tried 10 time\(s\); lower trainer.min_clients, and go on"),
        ):
            trainer.fit(model, data)
        asked = [(m.attempt, m.client) for m, _ in sent if isinstance(m, StepRequest)]
        assert asked == [(attempt, client) for attempt in range(MAX_ATTEMPTS) for client in (0, 1)]
        # Clients elsewhere hold what they began until they are told that it does not count.
        ended = [(m.attempt, m.counted) for m, _ in sent if isinstance(m, RoundEnd)]
        assert ended == [(attempt, []) for attempt in range(MAX_ATTEMPTS)]
        assert same_bits(state_of(model), before)

    def test_attempts_draw_different_clients(self, make_model: MakeModel, make_orchestrator: MakeOrchestrator) -> None:
        trainer = make_orchestrator(max_rounds=1, clients_per_round=2)
        trainer.fit(make_model(), RandomTokens([[5, 4]] * 6, batch_size=2))
        samples = [tuple(trainer.sample(3, attempt)) for attempt in range(MAX_ATTEMPTS)]
        assert len(set(samples)) > MAX_ATTEMPTS // 2
        assert samples[0] == tuple(trainer.sample(3))

    def test_more_than_a_round_has(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, data: RandomTokens
    ) -> None:
        with pytest.raises(ValueError, match=r"trainer\.min_clients is 3, but a round has 2 clients"):
            make_orchestrator(clients_per_round=2, min_clients=3).fit(make_model(), data)
