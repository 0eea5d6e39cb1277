"""What crosses, as bytes or handed over, and the ledger of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hosfl_lightning.fleet import Channel, Sent
from hosfl_lightning.wire import (
    FieldError,
    Message,
    NonFiniteError,
    ProjectedGradients,
    RoundEnd,
    StepRequest,
    Weights,
    encode,
    encoded_size,
)
from tests.wire.samples import BASIS, RUN, same

both_ways = pytest.mark.parametrize("serialize", [True, False])


def weights(client: int | None = None) -> Weights:
    return Weights(2, client, {"w": torch.ones(3)}, 0 if client is None else 5, attempt=1)


@both_ways
def test_the_ledger_names_the_client_and_the_bytes_of_the_frame(serialize: bool) -> None:
    channel = Channel(serialize)
    to_all, of_one, end = weights(), weights(0), RoundEnd(2, [0, 3])
    assert channel.down(to_all, receivers=4).client is None
    assert channel.up(of_one).client == 0
    channel.down(end, receivers=2)
    assert channel.ledger == [
        Sent("weights", "down", len(encode(to_all)), 4),
        Sent("weights", "up", len(encode(of_one)), 1, 0),
        Sent("round_end", "down", len(encode(end)), 2),
    ]
    channel.clear()
    assert channel.ledger == []


def test_what_was_sent_elsewhere_can_be_counted() -> None:
    channel = Channel(serialize=True)
    channel.count(StepRequest(2, 7), "down", 300)
    channel.count(RoundEnd(2, []), "down", 200, 4)
    assert channel.ledger == [Sent("step_request", "down", 300, 1, 7), Sent("round_end", "down", 200, 4)]


@both_ways
def test_it_means_the_same_and_is_a_copy_only_as_bytes(serialize: bool) -> None:
    channel, sent = Channel(serialize), weights(0)
    received: list[Message] = [channel.up(sent), channel.down(sent)]
    assert all(same(message, sent) for message in received)
    assert all((message is sent) is not serialize for message in received)


def test_its_frames_are_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    channel, frames = Channel(serialize=True), []

    def written(message: Any, run_id: bytes) -> bytes:
        frames.append(encode(message, run_id))
        return frames[-1]

    monkeypatch.setattr("hosfl_lightning.fleet.channel.encode", written)
    channel.up(weights(0))
    channel.run_id = RUN
    channel.up(weights(0))
    assert frames == [encode(weights(0)), encode(weights(0), RUN)]


@both_ways
def test_what_is_not_finite_does_not_arrive_but_was_sent(serialize: bool) -> None:
    channel = Channel(serialize)
    bad = ProjectedGradients(2, 0, BASIS, torch.tensor([1.0, torch.nan]), 3)
    with pytest.raises(NonFiniteError, match="projected_gradients: coefficients has 1 values"):
        channel.up(bad)
    assert channel.ledger == [Sent("projected_gradients", "up", encoded_size(bad), 1, 0)]


@both_ways
def test_a_loss_that_is_not_finite_is_no_message(serialize: bool) -> None:
    """JSON has no word for it, so it is not written; said by name all the same."""
    channel = Channel(serialize)
    for loss in (math.nan, math.inf):
        with pytest.raises(FieldError, match="projected_gradients: loss has a number that is NaN or infinite"):
            channel.up(ProjectedGradients(2, 0, BASIS, torch.ones(2), 3, loss=loss))
    assert channel.ledger == []
