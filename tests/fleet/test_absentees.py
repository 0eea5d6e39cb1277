"""Clients that missed rounds and return hold, bit for bit, what those hold that never left."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from hosfl_lightning import HOSFL, Orchestrator, SplitCausalLM
from hosfl_lightning.aggregation import UpdateError, apply_update, combine
from hosfl_lightning.availability import Probability, Trace
from hosfl_lightning.clients.catch_up import CatchUpError, State, client_state, same_state
from hosfl_lightning.fleet import Absentees, Channel, absentees
from hosfl_lightning.fleet.absentees import Absence
from hosfl_lightning.optim import SGD, AdamW, SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.server import CatchUp, Records
from hosfl_lightning.server.replay_log import ReplayLog
from hosfl_lightning.wire import CatchUpRequest, Message, ProjectedGradients, Snapshot, Update, encode
from tests.random_tokens import RandomTokens

pytestmark = pytest.mark.filterwarnings("ignore:the two sides of a probe", "ignore:mu=")

MakeModel = Callable[..., SplitCausalLM]
MakeOrchestrator = Callable[..., Orchestrator]

#: Client 0 never leaves; 1 misses rounds 0 to 2 and 5; 2 misses rounds 1 to 4, across one validation.
COMINGS = [[0, 2], [0], [0], [0, 1], [0, 1], [0, 2], [0, 1, 2], [0, 1, 2]]
ROUNDS = len(COMINGS)
BF16 = {"dtype": "bfloat16"}
FULL = {"lora": None}


def cosine(optimizer: Any) -> Any:
    return CosineAnnealingLR(optimizer, ROUNDS)


@pytest.fixture
def small_data() -> RandomTokens:
    """Three clients with short examples, two of which make a batch."""
    return RandomTokens([[6, 5], [4, 6], [5, 5]], batch_size=2)


@pytest.fixture
def returns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, State, State]]:
    """What every returning client ended with: how many updates it holds, its own state, and the others'."""
    kept: list[tuple[int, State, State]] = []
    compare = Absentees._compare

    def keeping(self: Absentees, replica: ZerothOrder, who: str) -> None:
        kept.append((replica.steps, client_state(replica), client_state(self.optimizer, copy=True)))
        compare(self, replica, who)

    monkeypatch.setattr(Absentees, "_compare", keeping)
    return kept


def absent(make: MakeOrchestrator, algorithm: HOSFL | None = None, **settings: Any) -> Orchestrator:
    """A run in which clients come and go."""
    algorithm = algorithm or HOSFL(probes=2, client_optimizer=SGD(lr=0.1))
    given = {"max_rounds": ROUNDS, "val_check_interval": 4, "availability": Trace(COMINGS), **settings}
    return make(algorithm, **given)


def rows(trainer: Orchestrator) -> list[dict[str, str]]:
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(-1).view(torch.uint8), b[n].view(-1).view(torch.uint8))
        for n in a
    )


RULES = {
    "sgd": SGD(lr=0.1),
    "momentum": SGD(lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": AdamW(lr=1e-2, weight_decay=0.1),
}


def alternate(
    path: Path, rule: UpdateRule, distribution: str = "rademacher", dtype: torch.dtype = torch.float32,
    policy: Any = "replay", serialize: bool = True,
) -> tuple[Counter[str], ZerothOrder, ZerothOrder]:  # fmt: skip
    """Two clients come and go over tensors without a model; the learning rate changes from round to round.

    Returns:
        How they returned, the optimizer of those that are up to date, and that of one which never left and of which no
        book is kept.
    """
    start = torch.linspace(-1, 1, 70).to(dtype)
    present, never_left = (
        ZerothOrder([nn.Parameter(start.clone()), nn.Parameter(start.view(7, 10).clone())], rule, seed=3)
        for _ in range(2)
    )
    log = ReplayLog.open(path, {"incarnation": "0-a"})
    records = Records(present, log, CatchUp(policy), bytes(16), "0-a")
    away = Absentees(present, records, Channel(serialize))
    for round, online in enumerate([[0, 1], [0], [0, 1], [1], [1], [0], [0, 1]]):
        away.attend(round, online, 2)
        basis = SharedDirections(3, round, 2, distribution)
        answer = ProjectedGradients(round, 0, basis.describe(), torch.tensor([0.3, -0.2 * round]), 1)
        for optimizer in (present, never_left):
            optimizer.param_groups[0]["lr"] = rule.lr / (1 + round)
            update = combine([answer], optimizer, mu=1e-3)
            apply_update(update, optimizer)
        log.append(round, encode(update))
    return away.chosen, present, never_left


class TestReturnsBitForBit:
    @pytest.mark.parametrize(
        ("rule", "distribution", "model", "simulation"),
        [
            ("sgd", "rademacher", {}, "per_client"),
            ("sgd", "gauss16", {**BF16, **FULL}, "batched"),
            ("momentum", "gauss16", {}, "batched"),
            ("momentum", "rademacher", BF16, "batched"),
            ("adamw", "rademacher", FULL, "batched"),
            ("adamw", "gauss16", {**BF16, **FULL}, "per_client"),
        ],
    )
    def test_in_whole_runs_with_a_cosine_schedule(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens,
        returns: list[tuple[int, State, State]], rule: str, distribution: str, model: dict[str, Any], simulation: Any,
    ) -> None:  # fmt: skip
        algorithm = HOSFL(2, 1e-2, distribution=distribution, client_optimizer=RULES[rule], client_scheduler=cosine)
        trainer = absent(
            make_orchestrator, algorithm, simulation=simulation, val_check_interval=ROUNDS, catch_up=CatchUp("replay")
        )
        trainer.fit(make_model(**model), small_data)
        assert [steps for steps, *_ in returns] == [3, 5, 6]
        shared = {t.data_ptr() for t in client_state(trainer.endpoint.client.optimizer).values()}
        for _, own, others in returns:
            assert same_bits(own, others)
            assert shared.isdisjoint(t.data_ptr() for t in own.values())
        ends = [own["0.theta"] for _, own, _ in returns]
        assert not torch.equal(ends[0], ends[1])
        assert trainer.summary["catch_up"] == {"replay": 3}

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    @pytest.mark.parametrize("distribution", ["rademacher", "gauss16"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("policy", ["replay", "snapshot"])
    @pytest.mark.parametrize("serialize", [False, True])
    def test_under_every_rule(
        self, tmp_path: Path, rule: UpdateRule, distribution: str, dtype: torch.dtype, policy: Any, serialize: bool
    ) -> None:
        chosen, present, never_left = alternate(tmp_path / "log", rule, distribution, dtype, policy, serialize)
        assert chosen == {policy: 3}
        assert same_bits(client_state(present), client_state(never_left))

    def test_as_if_nobody_had_left(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """The same clients take part in every round, but those that do not are online and take every update at once."""
        rule = AdamW(lr=1e-2)
        away, there = make_model(), make_model()
        trainer = absent(make_orchestrator, HOSFL(client_optimizer=rule, client_scheduler=cosine))
        trainer.fit(away, small_data)
        monkeypatch.setattr(Orchestrator, "sample", lambda self, round, attempt=0: COMINGS[round])
        never = make_orchestrator(HOSFL(client_optimizer=rule, client_scheduler=cosine), max_rounds=ROUNDS)
        never.fit(there, small_data)
        assert same_bits(away.trained_state(), there.trained_state())
        assert same_bits(*(client_state(t.endpoint.client.optimizer) for t in (trainer, never)))
        assert sum(trainer.summary["catch_up"].values()) == 3
        assert never.summary["catch_up"] == {}

    def test_with_clients_that_come_at_random_and_a_run_that_is_resumed(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, returns: list[tuple[int, State, State]]
    ) -> None:
        data = RandomTokens([[5, 4]] * 6, batch_size=2)
        settings: dict[str, Any] = {"availability": Probability(0.5), "val_check_interval": 3}
        algorithm = HOSFL(client_optimizer=AdamW(lr=1e-2), client_scheduler=cosine)
        whole, resumed = make_model(), make_model()
        uninterrupted = absent(make_orchestrator, algorithm, **settings)
        uninterrupted.fit(whole, data)
        assert len(returns) >= 4
        stopped = absent(make_orchestrator, algorithm, **settings | {"max_rounds": 3})
        stopped.fit(make_model(), data)
        assert stopped.run.history is not None and stopped.run.history.absentees is not None
        assert stopped.run.history.absentees.absences
        stopped.save_checkpoint(str(Path(stopped.log_dir) / "checkpoints" / "three.ckpt"))
        again = absent(make_orchestrator, algorithm, **settings)
        again.fit(resumed, data, ckpt_path=stopped.log_dir)
        assert same_bits(whole.trained_state(), resumed.trained_state())
        for key in ("catch_up", "bytes_per_client_round"):
            assert again.summary[key] == uninterrupted.summary[key]

    def test_states_are_kept_no_longer_than_somebody_holds_them(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens
    ) -> None:
        trainer = absent(make_orchestrator)
        held: list[set[int]] = []
        attend = Absentees.attend

        def keeping(self: Absentees, *args: Any) -> None:
            attend(self, *args)
            held.append(set(self.states))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Absentees, "attend", keeping)
            trainer.fit(make_model(), small_data)
        assert held == [{0}, {0, 1}, {0, 1}, {1}, {1}, {5}, set(), set()]


class TestAFaultIsFound:
    """Each of these is what a careless replay does."""

    RULE = SGD(lr=0.05, momentum=0.9)

    def test_todays_learning_rate_for_old_rounds(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        answer = Records.answer

        def todays_learning_rate(self: Records, request: CatchUpRequest) -> Iterator[Update]:
            rate = {"lr": self.replica.param_groups[0]["lr"]}
            return (replace(update, rule=update.rule | rate) for update in answer(self, request))  # type: ignore

        monkeypatch.setattr(Records, "answer", todays_learning_rate)
        with pytest.raises(CatchUpError, match=r"clients \[0\] replayed 2 round\(s\) from 3 on and do not hold what"):
            alternate(tmp_path / "log", self.RULE)
        algorithm = HOSFL(client_optimizer=SGD(lr=0.05), client_scheduler=cosine)
        with pytest.raises(CatchUpError, match=r"clients \[1\] replayed 3 round\(s\) from 0 on"):
            absent(make_orchestrator, algorithm, catch_up=CatchUp("replay")).fit(make_model(), small_data)

    @pytest.mark.parametrize("policy", ["replay", "snapshot"])
    def test_moments_that_are_forgotten(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
        replica_of = absentees.replica_of

        def forgetful(optimizer: ZerothOrder, state: State, step: int) -> ZerothOrder:
            return replica_of(optimizer, {name: t for name, t in state.items() if name.endswith("theta")}, step)

        monkeypatch.setattr(absentees, "replica_of", forgetful)
        with pytest.raises(CatchUpError):
            alternate(tmp_path / "log", self.RULE, policy=policy)

    def test_a_step_that_is_not_counted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        replica_of = absentees.replica_of
        monkeypatch.setattr(absentees, "replica_of", lambda live, state, step: replica_of(live, state, step - 1))
        with pytest.raises(CatchUpError, match=r"client 1 took a snapshot and does not hold"):
            alternate(tmp_path / "log", self.RULE, policy="snapshot")

    def test_a_state_that_moved_on_while_its_client_was_away(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(absentees, "client_state", lambda optimizer, copy=False: client_state(optimizer))
        with pytest.raises(CatchUpError):
            alternate(tmp_path / "log", self.RULE)

    @pytest.mark.parametrize("order", [slice(1, None), slice(None, -1), slice(None, None, -1)])
    def test_a_record_that_is_skipped_or_out_of_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: slice
    ) -> None:
        frames = ReplayLog.frames

        def some(self: ReplayLog, first: int = 0, stop: int | None = None) -> Iterator[bytes]:
            missed = [*frames(self, first, stop)]
            return iter(missed[order] if len(missed) > 1 else missed)

        monkeypatch.setattr(ReplayLog, "frames", some)
        with pytest.raises((CatchUpError, UpdateError), match=r"do not hold|missing before it|applied already"):
            alternate(tmp_path / "log", self.RULE)

    def test_a_single_bit(self) -> None:
        state = {"0.theta": torch.tensor([0.0, 1.0, torch.nan])}
        assert same_state(state, {"0.theta": state["0.theta"].clone()})
        for other in ([-0.0, 1.0, torch.nan], [0.0, 1.0 + 2**-23, torch.nan]):
            assert not same_state(state, {"0.theta": torch.tensor(other)})
        assert not same_state(state, {**state, "0.momentum_buffer": torch.zeros(3)})


class TestReplayOrSnapshot:
    def test_auto_takes_what_needs_fewer_seconds(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens,
        sent: list[tuple[Message, int]], capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """A snapshot of the LoRA client is 4 KiB, a record 0.7: four of them are less, fifteen are more."""
        trace: list[list[int]] = [[0, 1], *[[0]] * 4, [0, 1], *[[0]] * 14, [0, 1, 2]]
        trainer = absent(
            make_orchestrator, availability=Trace(trace), max_rounds=len(trace), val_check_interval=len(trace),
            catch_up=CatchUp(bandwidth=2e4),
        )  # fmt: skip
        trainer.fit(make_model(), small_data)
        assert trainer.summary["catch_up"] == {"replay": 1, "snapshot": 2}
        [one, two] = [m for m, _ in sent if isinstance(m, Snapshot)]
        assert (one.client, two.client, one.version) == (2, 1, 20) or (one.client, two.client) == (1, 2)
        assert "the records take" in one.reason
        assert "returns of absent clients, by  replay 1, snapshot 2" in capsys.readouterr().out

    def test_auto_weighs_the_time_to_draw_directions(self) -> None:
        auto = CatchUp(bandwidth=1000.0)
        assert auto.objection(400, 0.5, 1000) is None
        assert auto.objection(400, 0.7, 1000) == "the records take 1.1 s, a snapshot 1 s"
        assert auto.objection(1001, 0.0, 1000) is not None
        assert CatchUp("replay").objection(9999, 9.0, 1) is None
        assert CatchUp("snapshot").objection(1, 0.0, 9999) == "the policy is snapshot"

    def test_a_snapshot_is_the_whole_state(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens,
        returns: list[tuple[int, State, State]],
    ) -> None:  # fmt: skip
        trainer = absent(
            make_orchestrator, HOSFL(2, 1e-2, client_optimizer=RULES["adamw"]), catch_up=CatchUp("snapshot"),
            simulation="per_client",
        )  # fmt: skip
        trainer.fit(make_model(**BF16, **FULL), small_data)
        assert trainer.summary["catch_up"] == {"snapshot": 3}
        assert [steps for steps, *_ in returns] == [3, 5, 6]
        assert all(same_bits(own, others) for _, own, others in returns)

    @pytest.mark.parametrize(("policy", "simulation"), [("replay", "per_client"), ("snapshot", "batched")])
    def test_the_communication_log_is_the_wire(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens,
        sent: list[tuple[Message, int]], policy: Any, simulation: Any,
    ) -> None:  # fmt: skip
        trainer = absent(make_orchestrator, catch_up=CatchUp(policy), simulation=simulation)
        trainer.fit(make_model(), small_data)
        expected: Counter[str] = Counter()
        for message, receivers in sent:
            expected[message.kind] += len(encode(message, trainer.fleet.channel.run_id)) * receivers
        columns = [(row, f"comm/{kind}_bytes") for row in rows(trainer) for kind in expected]
        logged: Counter[str] = Counter()
        for row, column in columns:
            logged[column[len("comm/") : -len("_bytes")]] += int(float(row.get(column) or 0))
        assert logged == expected
        assert int(float(rows(trainer)[-1]["comm/total_bytes"])) == expected.total()
        kinds = {"catch_up_request"} | ({"snapshot"} if policy == "snapshot" else set())
        assert expected.keys() == {
            "step_request",
            "smashed_data",
            "multiplier",
            "projected_gradients",
            "update",
            *kinds,
        }
        requests = [m for m, _ in sent if isinstance(m, CatchUpRequest)]
        assert [(m.round, m.client, m.version) for m in requests] == [(3, 1, 0), (5, 2, 1), (6, 1, 5)]
        # Every client that was there gets the update of a round once; a replay sends it again to those that return.
        received: Counter[int] = Counter()
        for message, receivers in sent:
            if isinstance(message, Update):
                received[message.round] += receivers
        assert received == {r: 3 if policy == "replay" else len(COMINGS[r]) for r in range(ROUNDS)}

    def test_knows_a_client_by_who_made_its_last_update(self, tmp_path: Path, sent: list[tuple[Message, int]]) -> None:
        """It returns when the new server has long made as many updates as the client holds."""
        alternate(tmp_path / "log", SGD(lr=0.1))
        log = ReplayLog.open(tmp_path / "log", {"incarnation": "1-b"}, at_round=7)
        optimizer = ZerothOrder([nn.Parameter(torch.ones(3))], SGD())
        records = Records(optimizer, log, CatchUp("replay"), bytes(16), "1-b")
        away = Absentees(optimizer, records, Channel(False), {Absence(2, "9-z"): torch.tensor([3])})
        away.attend(7, [3], 4)
        [snapshot] = [m for m, _ in sent if isinstance(m, Snapshot)]
        assert snapshot.reason == "update 2 of server 9-z is not in the history of 1-b, which is at round 7"
        assert {a.incarnation for a in away.absences.values()} == {"0-a"}  # the last update that there is

    def test_those_that_left_together_replay_once_and_each_is_sent_its_own(self, tmp_path: Path) -> None:
        optimizer = ZerothOrder([nn.Parameter(torch.ones(3))], SGD(), seed=3)
        log, channel = ReplayLog.open(tmp_path / "log", {"incarnation": "0-a"}), Channel(True)
        away = Absentees(optimizer, Records(optimizer, log, CatchUp("replay"), bytes(16), "0-a"), channel)
        for round, online in enumerate([[0], [0], [0, 1, 2]]):
            away.attend(round, online, 3)
            answer = ProjectedGradients(round, 0, optimizer.basis(round).describe(), torch.ones(2), 1)
            apply_update(update := combine([answer], optimizer), optimizer)
            log.append(round, encode(update))
        frames = [*log.frames(0, 2)]
        assert [(s.kind, s.direction, s.receivers) for s in channel.ledger] == [
            ("catch_up_request", "up", 1), ("catch_up_request", "up", 1), ("update", "down", 2), ("update", "down", 2),
        ]  # fmt: skip
        assert [s.bytes for s in channel.ledger[2:]] == [len(frame) for frame in frames]
        assert away.chosen == {"replay": 2}

    @pytest.mark.parametrize("policy", ["replay", "snapshot"])
    def test_of_many_that_left_together_one_is_looked_at_and_all_are_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
    ) -> None:
        """Clients 0 and 5 stay, four leave, one of them for longer; a run that goes on knows who holds what."""
        seen = []
        for many in (2, 100):
            monkeypatch.setattr(absentees, "MANY", many)
            optimizer = ZerothOrder([nn.Parameter(torch.ones(3))], SGD(), seed=3)
            log, channel = ReplayLog.open(tmp_path / str(many), {"incarnation": "0-a"}), Channel(False)
            records = Records(optimizer, log, CatchUp(policy), bytes(16), "0-a")
            away = Absentees(optimizer, records, channel)
            for round, online in enumerate([[0, 5], range(0, 6, 5), [0, 1, 2, 3, 5], range(6)]):
                away.attend(round, online, 6)
                before, away = away.state_dict(), Absentees(optimizer, records, channel, chosen=away.chosen)
                away.load_state_dict(before)
                answer = ProjectedGradients(round, 0, optimizer.basis(round).describe(), torch.ones(2), 1)
                apply_update(update := combine([answer], optimizer), optimizer)
                log.append(round, encode(update))
                if round == 2:
                    assert away.absences == {4: Absence(0, "0-a")} and [*away.states] == [0]
            told = Counter[str]()
            for one in channel.ledger:
                told[f"{one.kind} {one.direction}"] += one.bytes * one.receivers
            seen.append((told, dict(away.chosen), away.absences, away.states))
        assert seen[0] == seen[1]
        assert seen[0][1:] == ({policy: 4}, {}, {})

    def test_a_checkpoint_of_an_earlier_version_says_it_client_by_client(self) -> None:
        away: Any = Absentees(None, None, None)  # type: ignore[arg-type]
        away.load_state_dict({"absences": {3: [2, "0-a"], 1: [2, "0-a"], 2: [0, "1-b"]}, "states": {}, "chosen": {}})
        assert away.absences == {1: Absence(2, "0-a"), 3: Absence(2, "0-a"), 2: Absence(0, "1-b")}
        away.strand([2, 4], Absence(2, "0-a"))
        assert away.absences == dict.fromkeys([1, 2, 3, 4], Absence(2, "0-a"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"policy": "guess"}, "catch_up.policy"), ({"bandwidth": 0.0}, "catch_up.bandwidth must be > 0")],
    )
    def test_bad_settings_are_named(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CatchUp(**settings)

    def test_no_log_no_absence(
        self, make_model: MakeModel, make_orchestrator: MakeOrchestrator, small_data: RandomTokens, tmp_path: Path
    ) -> None:
        trainer = absent(make_orchestrator, max_rounds=1)
        trainer.fit(make_model(), small_data)
        trainer.save_checkpoint(str(tmp_path / "elsewhere.ckpt"))
        with pytest.raises(ValueError, match="clients that were away replay the update log"):
            absent(make_orchestrator).fit(make_model(), small_data, ckpt_path=str(tmp_path / "elsewhere.ckpt"))
        with pytest.raises(ValueError, match=r"set trainer\.replay_log: true"):
            absent(make_orchestrator, replay_log=False).fit(make_model(), small_data)
