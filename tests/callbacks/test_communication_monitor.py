from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import Frozen, SplitFedSGD
from hosfl_lightning.callbacks import CommunicationMonitor
from hosfl_lightning.fleet import Channel, Sent
from hosfl_lightning.optim import SGD
from hosfl_lightning.wire import encode
from tests.conftest import RandomTokens


def monitor(trainer: Orchestrator) -> CommunicationMonitor:
    return next(c for c in trainer.callbacks if isinstance(c, CommunicationMonitor))


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_what_is_reported_is_the_length_of_every_encoded_message(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    simulation: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trainer = make_orchestrator(simulation=simulation, clients_per_round=2)
    sent: Counter[str] = Counter()
    directions: Counter[str] = Counter()
    deliver = Channel._send

    def recording(channel: Channel, message: Any, direction: str, receivers: int) -> Any:
        if channel is trainer.fleet.channel:  # what the memory monitor rehearses is not sent
            sent[message.kind] += len(encode(message)) * receivers
            directions[direction] += len(encode(message)) * receivers
        return deliver(channel, message, direction, receivers)

    monkeypatch.setattr(Channel, "_send", recording)
    trainer.fit(make_model(), data)
    assert monitor(trainer).totals == sent
    assert set(sent) == {"step_request", "smashed_data", "multiplier", "projected_gradients", "update"}
    assert trainer.summary["bytes_per_client_round"] == {kind: total / 6 for kind, total in sent.items()}
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["comm/up_bytes"]]
    assert sum(float(r["comm/up_bytes"]) for r in rows) == directions["up"]
    assert sum(float(r["comm/down_bytes"]) for r in rows) == directions["down"]
    assert float(rows[-1]["comm/total_bytes"]) == sum(sent.values())
    assert (monitor(trainer).up_bytes, monitor(trainer).down_bytes) == (directions["up"], directions["down"])


class Ledger:
    """What a monitor needs of a trainer and of its module."""

    def __init__(self) -> None:
        self.fleet = self
        self.sent: list[Sent] = []
        self.logged: dict[str, float] = {}

    def entries(self) -> list[Sent]:
        return self.sent

    def log(self, name: str, value: float) -> None:
        self.logged[name] = value

    def end_round(self, watching: CommunicationMonitor, *sent: Sent) -> None:
        self.sent, self.logged = list(sent), {}
        watching.on_train_batch_end(self, self, None, None, 0)


def test_a_client_takes_part_whatever_it_sends_and_once_a_round() -> None:
    watching, ledger = CommunicationMonitor(), Ledger()
    full = [Sent("weights", "down", 50, 3), *(Sent("weights", "up", 60, 1, client) for client in (0, 4, 9))]
    ledger.end_round(watching, *full)
    assert watching.client_rounds == 3
    assert ledger.logged == {
        "comm/weights_bytes": 330, "comm/up_bytes": 180, "comm/down_bytes": 150, "comm/total_bytes": 330
    }  # fmt: skip
    local_steps = [Sent("smashed_data", "up", 7, 1, client) for client in (0, 0, 2, 2)]
    back = [Sent("catch_up_request", "up", 5, 1, 8), Sent("snapshot", "down", 90, 1, 8)]
    ledger.end_round(watching, *back, *local_steps, Sent("probed_data", "up", 10, 1, 2))
    assert watching.client_rounds == 5
    assert (watching.up_bytes, watching.down_bytes) == (180 + 43, 150 + 90)
    per = watching.per_client_round
    assert list(per) == [
        "smashed_data", "multiplier", "projected_gradients", "update", "weights", "probed_data", "catch_up_request",
        "snapshot",
    ]  # fmt: skip
    assert (per["weights"], per["probed_data"], per["multiplier"]) == (330 / 5, 10 / 5, 0)


def test_a_state_that_is_loaded_goes_on_counting() -> None:
    watching, resumed, ledger = CommunicationMonitor(), CommunicationMonitor(), Ledger()
    first = [Sent("weights", "down", 50, 2), Sent("weights", "up", 60, 1, 1)]
    second = [Sent("update", "down", 9, 2), Sent("smashed_data", "up", 8, 1, 1)]
    ledger.end_round(watching, *first)
    resumed.load_state_dict(json.loads(json.dumps(watching.state_dict())))
    for one in (watching, resumed):
        ledger.end_round(one, *second)
    assert resumed.state_dict() == watching.state_dict()
    assert (resumed.up_bytes, resumed.down_bytes, resumed.client_rounds) == (68, 118, 2)


def test_scalars_do_not_grow_with_the_model_and_a_dense_gradient_does(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens
) -> None:
    def answer_bytes(algorithm: Any, **kwargs: Any) -> float:
        trainer = make_orchestrator(algorithm, max_rounds=1)
        trainer.fit(make_model(**kwargs), data)
        return trainer.summary["bytes_per_client_round"]["projected_gradients"]

    assert answer_bytes(None, cut=1) == answer_bytes(None, cut=3)
    dense = answer_bytes(SplitFedSGD(SGD(lr=0.1)))
    assert dense > 768 * 4  # d_client, fp32
    assert answer_bytes(Frozen()) == 0


def test_a_count_is_logged_exactly_beyond_what_fp32_holds(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens
) -> None:
    trainer = make_orchestrator(max_rounds=1)
    monitor(trainer).totals["update"] = 2**40 + 1
    trainer.fit(make_model(), data)
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["comm/total_bytes"]]
    assert float(rows[-1]["comm/total_bytes"]) == sum(monitor(trainer).totals.values()) > 2**40


def test_padding_does_not_travel(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator]
) -> None:
    def smashed(lengths: list[list[int]]) -> float:
        trainer = make_orchestrator(max_rounds=1)
        trainer.fit(make_model(), RandomTokens(lengths))
        return trainer.summary["bytes_per_client_round"]["smashed_data"] * len(lengths)

    # 24 tokens either way; in the first the short row is padded by six, in a joint batch the short client by more.
    padded, even = smashed([[9, 3], [6, 6]]), smashed([[6, 6], [6, 6]])
    assert abs(padded - even) < 16  # the mask's bits and the header's digits; six padded tokens would be 768 bytes
