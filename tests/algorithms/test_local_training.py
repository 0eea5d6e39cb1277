"""What the methods share whose clients take steps of their own: who counts, what travels, what a stop leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from hosfl_lightning import Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import Algorithm, FedAvg, SplitFedV1, SplitFedV2, SplitLearning, TooFewClientsError
from hosfl_lightning.availability import Trace
from hosfl_lightning.clients import vectors
from hosfl_lightning.run.training import collect
from hosfl_lightning.wire import Weights, encode
from tests.algorithms.plain_rounds import METHODS, method, two_layers
from tests.algorithms.two_layers import Crossing, Points, TwoLayers, orchestrator
from tests.random_tokens import RandomTokens
from tests.small_run import contents, plain

every_method = pytest.mark.parametrize("kind", METHODS)


def trained(kind: type[Algorithm], folder: Path, data: Points | None = None, **settings: Any) -> dict[str, Tensor]:
    """Both halves after a run, and the last round's training loss."""
    model, trainer = two_layers(), orchestrator(method(kind, local_steps=2), folder, **settings)
    trainer.fit(model, data or Points())
    return {**model.trained_state(), "train/loss": trainer.callback_metrics["train/loss"]}


def held(trainer: Orchestrator) -> Any:
    """All that a run hands on to its next round, but for counters and callbacks."""
    kept = collect(trainer)
    kept["state_dict"] = trainer.lightning_module.trained_state()
    return plain({key: kept[key] for key in ("state_dict", "method", "optimizer_states", "lr_schedulers")})


class Damaged(Points):
    """One client's points are not numbers, from a step on."""

    def __init__(self, client: int, first: int = 0) -> None:
        super().__init__()
        self.client, self.first = client, first

    def client_batch(self, client: int, round: int) -> dict[str, Tensor]:
        batch = super().client_batch(client, round)
        damaged = client == self.client and round >= self.first
        return {**batch, "points": batch["points"] * torch.nan} if damaged else batch


@every_method
def test_encoded_messages_give_the_bits_that_handed_over_ones_do(kind: type[Algorithm], tmp_path: Path) -> None:
    handed, encoded = (trained(kind, tmp_path, simulation=one) for one in ("batched", "per_client"))
    assert plain(handed) == plain(encoded)


class TestRefusals:
    @every_method
    def test_the_round_goes_on_without_a_client_that_sends_no_numbers(
        self, kind: type[Algorithm], tmp_path: Path
    ) -> None:
        whole: dict[str, Any] = {"clients_per_round": None, "max_rounds": 3}
        with pytest.warns(UserWarning, match="client 1 is refused: .*finite"):
            refused = trained(kind, tmp_path, Damaged(1), **whole)
        away = Trace([[0, 2, 3]])
        assert plain(refused) == plain(trained(kind, tmp_path, availability=away, **whole))

    @every_method
    def test_a_refused_client_leaves_no_moments(
        self, kind: type[Algorithm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        message = vectors.message

        def damaged(
            trained: Any, vector: Tensor, round: int, client: int, num_terms: int = 0, **fields: Any
        ) -> Weights:
            vector = vector * torch.nan if client == 1 and num_terms else vector
            return message(trained, vector, round, client, num_terms=num_terms, **fields)

        monkeypatch.setattr(vectors, "message", damaged)
        trainer = orchestrator(method(kind), tmp_path, clients_per_round=None, max_rounds=1)
        with pytest.warns(UserWarning, match="client 1 is refused"):
            trainer.fit(two_layers(), Points())
        state = collect(trainer)["method"]
        assert set(state["moments"]) == set(state.get("server_moments", state["moments"])) == {0, 2, 3}
        assert trainer.run.refused == {1: 1}

    @every_method
    def test_too_few_answers_leave_both_halves_and_all_moments_as_they_were(
        self, kind: type[Algorithm], tmp_path: Path
    ) -> None:
        def run(**settings: Any) -> Orchestrator:
            return orchestrator(method(kind, local_steps=2), tmp_path, clients_per_round=None, **settings)

        good, stopped = run(max_rounds=2), run(min_clients=4)
        good.fit(two_layers(), Points())
        # The second step of the third round: client 3 has sent one good minibatch by then, the others all of theirs.
        with pytest.warns(UserWarning, match="client 3 is refused"), pytest.raises(TooFewClientsError, match="round 2"):
            stopped.fit(two_layers(), Damaged(3, first=5))
        assert held(stopped) == held(good)

    def test_two_processes(self, tmp_path: Path) -> None:
        trainer = orchestrator(SplitFedV2(), tmp_path, devices=2)
        with pytest.raises(ValueError, match=r"trainer\.devices: the clients of SplitFedV2 .*; set it to 1"):
            trainer.fit(TwoLayers(), Points())

    def test_no_local_step(self) -> None:
        with pytest.raises(ValueError, match="local_steps must be >= 1, got 0"):
            SplitFedV1(local_steps=0)


class Ledger(Callback):
    """The messages of every round, by kind and direction."""

    def __init__(self) -> None:
        self.rounds: list[Counter[tuple[str, str]]] = []
        self.bytes: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        entries = trainer.fleet.entries()
        self.rounds.append(Counter((sent.kind, sent.direction) for sent in entries))
        self.bytes += [sent.bytes for sent in entries if (sent.kind, sent.direction) == ("weights", "up")]


class TestTravel:
    @every_method
    def test_weights_both_ways_and_the_cut_at_every_step(self, kind: type[Algorithm], tmp_path: Path) -> None:
        ledger, crossing = Ledger(), Crossing()
        trainer = orchestrator(method(kind, local_steps=3), tmp_path, callbacks=[ledger, crossing])
        trainer.fit(two_layers(), Points())
        crossings = {} if kind is FedAvg else {("smashed_data", "up"): 9, ("multiplier", "down"): 9}
        a_round = {("weights", "up"): 3, ("weights", "down"): 3, ("round_end", "down"): 1, **crossings}
        assert ledger.rounds == 5 * [a_round]
        *_, message = sent = [message for message in crossing.up if isinstance(message, Weights)]
        assert ledger.bytes == [len(encode(one, bytes(16))) for one in sent]
        assert sum(tensor.numel() for tensor in message.tensors.values()) == (57 if kind is FedAvg else 36)
        assert trainer.summary["local_steps"] == 3

    @every_method
    def test_a_client_that_was_away_is_sent_the_weights_and_nothing_else(
        self, kind: type[Algorithm], tmp_path: Path
    ) -> None:
        online = [[0, 1], [2, 3], [0, 2], [0, 1], [1, 2]]
        settings: dict[str, Any] = {"clients_per_round": 2, "availability": Trace(online)}
        ledger = Ledger()
        trainer = orchestrator(method(kind), tmp_path, callbacks=[ledger], **settings)
        trainer.fit(two_layers(), Points())
        a_round = {"weights", "smashed_data", "multiplier", "round_end"}
        assert {kind for counts in ledger.rounds for kind, _ in counts} <= a_round
        assert {k: steps for k, (steps, _) in trainer.endpoint.moments.held.items()} == {0: 3, 1: 3, 2: 3, 3: 1}
        assert trainer.run.history is not None
        assert trainer.run.history.log is None


@every_method
def test_stopped_and_resumed_is_never_stopped(kind: type[Algorithm], tmp_path: Path) -> None:
    def run(name: str, rounds: int, ckpt_path: str | None = None) -> Orchestrator:
        settings: dict[str, Any] = {"val_check_interval": 2, "logger": True, "enable_checkpointing": True}
        trainer = orchestrator(method(kind, local_steps=2), tmp_path / name, max_rounds=rounds, **settings)
        trainer.fit(two_layers(), Points(), ckpt_path=ckpt_path)
        return trainer

    expected = run("never", 4)
    resumed = run("stopped", 4, run("stopped", 2).log_dir)
    assert held(resumed) == held(expected)
    rows = [contents(Path(trainer.log_dir))["metrics.csv"] for trainer in (expected, resumed)]
    assert rows[0] == rows[1]


def costs(trainer: Orchestrator) -> dict[str, float]:
    return {**trainer.summary["memory"], "client_forwards": trainer.summary["client_forwards_per_round"]}


class TestMemory:
    @pytest.mark.parametrize("kind", [SplitFedV2, FedAvg])
    def test_checkpointing_halves_the_peak_and_changes_no_bit(
        self, kind: type[Algorithm], tmp_path: Path, make_model: Callable[..., SplitCausalLM]
    ) -> None:
        def run(checkpointing: bool) -> tuple[Any, dict[str, float]]:
            model, data = make_model(cut=3, client_holds="whole"), RandomTokens([[40, 37], [33, 30]])
            trainer = orchestrator(method(kind, checkpointing=checkpointing), tmp_path, max_rounds=1, **everybody)
            trainer.fit(model, data)
            return plain(model.trained_state()), costs(trainer)

        everybody: dict[str, Any] = {"clients_per_round": None}
        (with_graph, graph), (with_inputs, inputs) = run(False), run(True)
        assert with_inputs == with_graph
        working = [report["client_peak_bytes"] - report["client_static_bytes"] for report in (graph, inputs)]
        assert working[1] < 0.6 * working[0]
        assert inputs["client_forwards"] > 1.2 * graph["client_forwards"]

    @every_method
    def test_the_report_counts_every_local_step_and_what_a_client_holds(
        self, kind: type[Algorithm], tmp_path: Path
    ) -> None:
        def report(steps: int) -> dict[str, float]:
            trainer = orchestrator(method(kind, local_steps=steps), tmp_path, max_rounds=1)
            trainer.fit(two_layers(), Points())
            return costs(trainer)

        once, thrice = report(1), report(3)
        assert thrice["client_forwards"] == pytest.approx(3 * once["client_forwards"])
        # A client that has a loss of its own keeps that of each step, fp32, to say the mean.
        losses = 2 * 4 if kind is FedAvg else 0
        assert thrice["client_peak_bytes"] == once["client_peak_bytes"] + losses
        held = 4 * (57 if kind is FedAvg else 36)
        assert once["client_static_bytes"] == 3 * held, "the parameters and two moments of each"
        assert (once["server_static_bytes"] == 0) == (kind is FedAvg)
        assert (once["client_waiting_bytes"] == 0) == (kind is FedAvg)


def test_only_in_a_relay_a_client_begins_where_another_has_stopped(tmp_path: Path) -> None:
    def begins(kind: type[Algorithm]) -> int:
        """With how many different weights the clients of a round begin."""
        crossing = Crossing()
        orchestrator(method(kind), tmp_path, max_rounds=1, callbacks=[crossing]).fit(two_layers(), Points())
        sent = [message for message in crossing.down if isinstance(message, Weights)]
        assert len(sent) == 3
        return len({repr(plain(message.tensors)) for message in sent})

    for kind in METHODS:
        assert begins(kind) == (3 if kind is SplitLearning else 1)
