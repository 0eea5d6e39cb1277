"""Clients of the server's process: who is asked how, whose answer is taken, and what all are told."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hosfl_lightning.clients import Endpoint
from hosfl_lightning.fleet import Channel, LocalFleet, Processes, Sent
from hosfl_lightning.fleet.base import objection
from hosfl_lightning.wire import (
    Coded,
    Message,
    Multiplier,
    ProbedData,
    ProbeRequest,
    ProjectedGradients,
    RoundEnd,
    SmashedData,
    StepRequest,
    Update,
    encoded_size,
)
from tests.fleet.test_processes import TwoProcesses
from tests.wire.samples import BASIS, RULE, STREAM, same

ROUND, ATTEMPT = 6, 2
UPDATE = Update(ROUND, BASIS, torch.ones(2), RULE, 7, [1, 3], [0.25, 0.75], attempt=ATTEMPT)
both_ways = pytest.mark.parametrize("serialize", [True, False])
joint_or_not = pytest.mark.parametrize("joint", [True, False])


class Clients(Endpoint):
    """Answers a `StepRequest` with a `ProjectedGradients`, unless it was told how else; keeps what it was sent."""

    def __init__(self, otherwise: dict[int, Callable[[ProjectedGradients], Message]] | None = None) -> None:
        self.otherwise = otherwise or {}
        self.heard: list[list[Message]] = []
        self.forgot = 0

    def make_client(self, half: Any) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        self.forgot += 1

    def handle(self, requests: Sequence[Message]) -> list[Message]:
        self.heard.append([*requests])
        return [self.answer(r) for r in requests if isinstance(r, StepRequest)]

    def answer(self, request: StepRequest) -> Message:
        k = request.client
        answer = ProjectedGradients(request.round, k, BASIS, torch.tensor([float(k), 0.5]), 3, request.attempt)
        return self.otherwise.get(k, lambda own: own)(answer)


def fleet_of(
    endpoint: Clients, *, serialize: bool = False, joint: bool = False, processes: Processes | None = None
) -> LocalFleet:
    """With the clients 1, 3 and 4 in the round."""
    fleet = LocalFleet(endpoint, Channel(serialize), joint, processes)
    fleet.assemble([1, 3, 4])
    return fleet


def requests(*clients: int) -> dict[int, StepRequest]:
    return {k: StepRequest(ROUND, k, ATTEMPT, 5, RULE) for k in clients}


@both_ways
@pytest.mark.parametrize(("joint", "groups"), [(True, [[1, 3, 4]]), (False, [[1], [3], [4]])])
def test_all_are_asked_at_once_or_one_after_the_other(joint: bool, groups: list[list[int]], serialize: bool) -> None:
    endpoint = Clients()
    fleet = fleet_of(endpoint, serialize=serialize, joint=joint)
    asked = requests(1, 3, 4)
    answers = fleet.ask(asked, ProjectedGradients)
    assert [[request.client for request in group] for group in endpoint.heard] == groups  # type: ignore[union-attr]
    for request in [request for group in endpoint.heard for request in group]:
        mine = asked[request.client]  # type: ignore[union-attr,index]
        assert same(request, mine)
        assert (request is mine) is not serialize
    assert [answer.client for answer in answers] == [1, 3, 4]
    assert all(same(answer, endpoint.answer(asked[answer.client])) for answer in answers)
    assert fleet.refused == {}


@joint_or_not
def test_what_crosses_is_in_the_ledger_client_by_client(joint: bool) -> None:
    endpoint = Clients()
    fleet = fleet_of(endpoint, joint=joint)
    fleet.ask(requests(1, 3), ProjectedGradients)
    down = [Sent("step_request", "down", encoded_size(r), 1, k) for k, r in requests(1, 3).items()]
    up = [Sent("projected_gradients", "up", encoded_size(endpoint.answer(r)), 1, k) for k, r in requests(1, 3).items()]
    one_by_one = [down[0], up[0], down[1], up[1]]
    assert fleet.channel.ledger == ([*down, *up] if joint else one_by_one)
    assert fleet.entries() == fleet.channel.ledger


@joint_or_not
def test_only_those_are_asked_that_there_is_a_request_for_and_that_are_of_this_process(joint: bool) -> None:
    class First(Processes):
        def own(self, clients: Sequence[Any]) -> list[Any]:
            return [*clients[::2]]

    endpoint = Clients()
    fleet = fleet_of(endpoint, joint=joint, processes=First())
    assert fleet.own == [1, 4]
    assert [answer.client for answer in fleet.ask(requests(3, 4), ProjectedGradients)] == [4]
    assert fleet.ask(requests(3), ProjectedGradients) == []
    assert fleet.ask({}, ProjectedGradients) == []
    assert [[request.client for request in group] for group in endpoint.heard] == [[4]]  # type: ignore[union-attr]
    assert fleet.refused == {}


def test_one_of_several_kinds_may_be_expected() -> None:
    probed = ProbedData(ROUND, 3, 0, 1, Coded.of(torch.ones(2, 2), "fp32", STREAM, 2), ATTEMPT)
    fleet = fleet_of(Clients({3: lambda own: probed}))
    assert [type(answer) for answer in fleet.ask(requests(1, 3), ProjectedGradients, ProbedData)] == [
        ProjectedGradients, ProbedData,
    ]  # fmt: skip
    assert fleet.refused == {}
    assert [answer.client for answer in fleet.ask(requests(1, 3), ProbedData)] == [3]
    assert fleet.refused == {1: "it sent a projected_gradients, expected was probed_data"}


REFUSED: dict[str, tuple[Callable[[ProjectedGradients], Message], str]] = {
    "another kind": (
        lambda own: RoundEnd(ROUND, [], ATTEMPT),
        "it sent a round_end, expected was projected_gradients or probed_data",
    ),
    "another round": (lambda own: replace(own, round=5), "its answer is for round 5, this is round 6"),
    "an earlier attempt": (
        lambda own: replace(own, attempt=1),
        "its answer is for attempt 1 of the round, this is attempt 2",
    ),
    "another client": (lambda own: replace(own, client=4), "it answers for client 4"),
    "no number": (
        lambda own: replace(own, coefficients=own.coefficients * torch.nan),
        "projected_gradients: coefficients has 2 values that are NaN or infinite",
    ),
}


@both_ways
@joint_or_not
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_answer_is_refused_by_name_and_the_others_go_on(case: str, joint: bool, serialize: bool) -> None:
    answer, reason = REFUSED[case]
    endpoint = Clients({3: answer})
    fleet = fleet_of(endpoint, serialize=serialize, joint=joint)
    answers = fleet.ask(requests(1, 3, 4), ProjectedGradients, ProbedData)
    assert [answer.client for answer in answers] == [1, 4]
    assert all(same(answer, endpoint.answer(requests(answer.client)[answer.client])) for answer in answers)
    assert fleet.refused == {3: reason}
    assert sum(sent.direction == "up" for sent in fleet.channel.ledger) == 3, "it has come, after all"


@both_ways
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss": math.nan}, "projected_gradients: loss has a number that is NaN or infinite"),
        ({"basis": {"a": object()}}, "basis|JSON"),
    ],
)
def test_what_cannot_be_written_is_refused_as_well(change: dict[str, Any], reason: str, serialize: bool) -> None:
    fleet = fleet_of(Clients({3: lambda own: replace(own, **change)}), serialize=serialize)
    assert [answer.client for answer in fleet.ask(requests(1, 3, 4), ProjectedGradients)] == [1, 4]
    assert fleet.refused.keys() == {3}
    assert re.search(reason, fleet.refused[3])


@both_ways
@pytest.mark.parametrize("message", [UPDATE, RoundEnd(ROUND, [1, 3], ATTEMPT)], ids=lambda message: message.kind)
def test_all_are_told_the_same_once(message: Update | RoundEnd, serialize: bool) -> None:
    endpoint = Clients()
    fleet = fleet_of(endpoint, serialize=serialize)
    fleet.tell(message, [0, 1, 3, 4, 8])
    [[heard]] = endpoint.heard
    assert same(heard, message)
    assert (heard is message) is not serialize
    assert fleet.channel.ledger == [Sent(message.kind, "down", encoded_size(message), 5)]


def test_a_run_that_breaks_off_is_forgotten_by_the_clients() -> None:
    endpoint = Clients()
    fleet_of(endpoint).abandon()
    assert (endpoint.forgot, endpoint.heard) == (1, [])


def test_what_several_processes_have_sent_is_put_together() -> None:
    fleet = fleet_of(Clients(), processes=TwoProcesses([["multiplier", "down", 72, 1, 4]]))
    fleet.channel.ledger.append(Sent("update", "down", 580, 3))
    assert fleet.entries() == [Sent("update", "down", 580, 3), Sent("multiplier", "down", 72, 1, 4)]


def smashed(step: int) -> SmashedData:
    mask = torch.ones(1, 2, dtype=torch.bool)
    return SmashedData.pack(ROUND, 1, torch.ones(1, 2, 3), torch.zeros(1), mask, step=step, attempt=ATTEMPT)


@pytest.mark.parametrize(
    ("request_", "answer", "reason"),
    [(ProbeRequest(ROUND, 1, 2, 1, ATTEMPT),
      ProbedData(ROUND, 1, 2, 0, Coded.of(torch.ones(2, 2), "fp32", STREAM, 2), ATTEMPT),
      "it sent side 0 of probe 2, asked for was 1 of 2"),
     (StepRequest(ROUND, 1, ATTEMPT, step=2), smashed(1), "its smashed data are of local step 1, this is step 2"),
     (Multiplier(ROUND, 1, Coded.of(torch.ones(2, 2), "fp32", STREAM, 1), ATTEMPT, step=1), smashed(1),
      "its smashed data are of local step 1, this is step 2")],
)  # fmt: skip
def test_what_answers_an_earlier_request_of_the_attempt_is_refused(
    request_: Message, answer: Message, reason: str
) -> None:
    assert objection(request_, answer, [type(answer)]) == reason


def test_later_local_steps_may_be_sent() -> None:
    """A minibatch without a loss term is passed by."""
    assert objection(StepRequest(ROUND, 1, ATTEMPT), smashed(3), [SmashedData]) is None
