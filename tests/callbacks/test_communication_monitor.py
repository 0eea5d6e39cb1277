from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning import Orchestrator, SplitCausalLM
from hosfl_lightning.algorithms import Frozen, SplitFedSGD
from hosfl_lightning.callbacks import CommunicationMonitor
from hosfl_lightning.optim import SGD
from hosfl_lightning.wire import encode
from tests.conftest import RandomTokens


def monitor(trainer: Orchestrator) -> CommunicationMonitor:
    return next(c for c in trainer.callbacks if isinstance(c, CommunicationMonitor))


@pytest.mark.parametrize("simulation", ["batched", "per_client"])
def test_what_is_reported_is_the_length_of_every_encoded_message(
    make_model: Callable[..., SplitCausalLM], make_orchestrator: Callable[..., Orchestrator], data: RandomTokens,
    simulation: str,
) -> None:  # fmt: skip
    trainer = make_orchestrator(simulation=simulation, clients_per_round=2)
    sent: Counter[str] = Counter()
    directions: Counter[str] = Counter()
    deliver = trainer.transport._send

    def recording(message: Any, direction: str, receivers: int) -> Any:
        sent[message.kind] += len(encode(message)) * receivers
        directions[direction] += len(encode(message)) * receivers
        return deliver(message, direction, receivers)

    trainer.transport._send = recording  # type: ignore[method-assign]
    trainer.fit(make_model(), data)
    assert monitor(trainer).totals == sent
    assert set(sent) == {"smashed_data", "multiplier", "projected_gradients", "update"}
    assert trainer.summary["bytes_per_client_round"] == {kind: total / 6 for kind, total in sent.items()}
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["comm/up_bytes"]]
    assert sum(float(r["comm/up_bytes"]) for r in rows) == directions["up"]
    assert sum(float(r["comm/down_bytes"]) for r in rows) == directions["down"]
    assert float(rows[-1]["comm/total_bytes"]) == sum(sent.values())


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
