"""Who is online is a function of the seed, the round and the attempt, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from hosfl_lightning.availability import Always, Availability, Probability, Trace, among

ALL = [Always(), Probability(0.6), Trace([[2, 0], [1], []]), Trace({0: [2, 0], 3: []})]


@pytest.mark.parametrize("availability", ALL, ids=["always", "probability", "list", "dictionary"])
def test_pure_ascending_and_known_clients(availability: Availability) -> None:
    state = torch.get_rng_state()
    rounds = range(8)
    first = [availability.online(3, 5, r) for r in rounds]
    assert [availability.online(3, 5, r) for r in reversed(rounds)] == first[::-1]
    for clients in first:
        assert [*clients] == sorted(set(clients))
        assert all(type(k) is int and 0 <= k < 3 for k in clients)
    assert torch.equal(torch.get_rng_state(), state)


def test_always_is_everybody() -> None:
    assert [*Always().online(4, 1, 2, 3)] == [0, 1, 2, 3]


def test_who_is_among_them() -> None:
    for ids in ([0, 2, 5, 9], range(0, 4, 3), range(0), []):
        assert among(ids, 6).tolist() == [k in ids for k in range(6)]


@pytest.mark.parametrize("p", [0.05, 0.7])
def test_as_often_as_asked_for_each_client_round_and_attempt(p: float) -> None:
    clients, rounds = 50, 200
    there = torch.zeros(2, rounds, clients)
    for attempt in range(2):
        for r in range(rounds):
            there[attempt, r, Probability(p).online(clients, 1, r, attempt)] = 1
    deviation = (p * (1 - p)) ** 0.5
    assert abs(there.mean() - p) < 4 * deviation / (2 * rounds * clients) ** 0.5
    assert (there.mean((0, 1)) - p).abs().max() < 4 * deviation / (2 * rounds) ** 0.5  # each client
    z = (there - p) / deviation
    for pair in (z[0] * z[1], z[:, 1:] * z[:, :-1], z[..., 1:] * z[..., :-1]):  # attempts, rounds, clients
        assert abs(pair.mean()) < 4 / pair.numel() ** 0.5


def test_the_ends_of_the_range() -> None:
    assert Probability(1.0).online(1000, 0, 0) == list(range(1000))
    assert Probability(1e-12).online(1000, 0, 0) == []
    # Client 495 has the word 2**32 - 85, which fp32 would round up to the bound.
    assert Probability(1.0).online(1000, 0, 59330) == list(range(1000))


def test_other_clients_do_not_matter() -> None:
    many = Probability(0.5).online(300, 9, 4)
    assert Probability(0.5).online(100, 9, 4) == [k for k in many if k < 100]


def test_a_larger_probability_adds_clients() -> None:
    """One threshold on one number a client: who is there at 0.3 is there at 0.31."""
    for r in range(20):
        assert set(Probability(0.3).online(200, 0, r)) <= set(Probability(0.31).online(200, 0, r))


def test_golden_rounds() -> None:
    """Words of tensor 1, from an oracle in Python's integers; the sampling permutations use tensor 0."""
    assert Probability(0.5).online(16, 0, 0) == [0, 1, 4, 10, 12, 15]
    assert Probability(0.5).online(16, 2**63 + 5, 6, attempt=2) == [0, 3, 4, 5, 6, 8, 10, 13]


def test_seed_round_and_attempt_each_change_it() -> None:
    drawn = [Probability(0.5).online(64, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(clients) for clients in drawn}) == 4


def test_a_list_begins_again_at_its_end() -> None:
    trace = Trace([[1, 0], [], [2]])
    assert [trace.online(3, 0, r) for r in range(5)] == [[0, 1], [], [2], [0, 1], []]
    assert trace.online(3, 7, 1, attempt=4) == []


def test_a_dictionary_names_the_changes() -> None:
    trace = Trace({5: [0, 1], 0: [2], 2: []})
    assert [trace.online(3, 0, r) for r in range(7)] == [[2], [2], [], [], [], [0, 1], [0, 1]]


@pytest.mark.parametrize("rounds", [[[1, 0], [2]], {0: [1, 0], 12: [2]}])
def test_a_file_is_what_it_holds(rounds: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(rounds))
    given, read = Trace(rounds), Trace(str(path))
    assert [read.online(3, 0, r) for r in range(20)] == [given.online(3, 0, r) for r in range(20)]
    assert read.settings() == given.settings()


def test_what_is_given_back_can_be_changed() -> None:
    trace = Trace([[0, 1]])
    trace.online(2, 0, 0).clear()
    assert trace.online(2, 0, 0) == [0, 1]


def test_settings_tell_them_apart_and_are_plain() -> None:
    different: list[Availability] = [
        *ALL, Probability(0.5), Trace([[0, 2], [1]]), Trace({0: [0, 2], 1: [1], 2: []}),
    ]  # fmt: skip
    written = [json.dumps(availability.settings()) for availability in different]
    assert len(set(written)) == len(different)
    assert Trace([[0, 2], [1], []]).settings() == ALL[2].settings()


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, float("nan")])
def test_a_probability_out_of_range_is_named(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got"):
        Probability(p)


@pytest.mark.parametrize(
    ("rounds", "match"),
    [
        ([], "rounds must name who is online in round 0"),
        ({1: [0]}, "rounds must name who is online in round 0"),
        ([[0], [-1]], "rounds names -1 in round 1"),
        ([[0], ["a"]], "rounds names 'a' in round 1"),
        ([[True]], "rounds names True in round 0"),
        ([[0], 3], "a list of clients for round 1, got 3"),
        ({0: [0], "x": [1]}, "rounds has the key 'x'"),
        ({0: [0], -2: [1]}, "rounds has the key -2"),
        (7, "rounds must be a list or a dictionary"),
    ],
)
def test_a_bad_trace_is_named(rounds: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Trace(rounds)


@pytest.mark.parametrize("content", [None, "[[0", "3"])
def test_a_bad_trace_file_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"Trace: rounds (is .*trace\.json'|must be a list or a dictionary)"):
        Trace(str(path))


def test_a_client_that_the_run_does_not_have_is_named_in_the_first_round() -> None:
    with pytest.raises(ValueError, match=r"rounds names client 9 in round 2, but the clients are 0\.\.4"):
        Trace([[0], [], [1, 9]]).online(5, 0, 0)


@pytest.mark.parametrize(
    ("name", "init_args", "expected"),
    [
        ("Always", {}, Always()),
        ("Probability", {"p": 0.7}, Probability(0.7)),
        ("Trace", {"rounds": [[0, 1], [2]]}, Trace([[0, 1], [2]])),
        ("Trace", {"rounds": {0: [0, 1], 10: [2]}}, Trace({0: [0, 1], 10: [2]})),
    ],
)
def test_a_recipe_names_it(name: str, init_args: dict[str, Any], expected: Availability) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--availability", type=Availability)
    chosen = {"class_path": f"hosfl_lightning.availability.{name}", "init_args": init_args}
    config = parser.parse_object({"availability": chosen})
    read = parser.parse_string(parser.dump(config))  # as the saved config of a run is read again
    for parsed in (config, read):
        assert parser.instantiate(parsed).availability.settings() == expected.settings()
