"""Clients that send what they should not: it counts for nothing, and the others' bits are as if it had not come."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hosfl_lightning.wire import Coded, ProjectedGradients, decode, encode, peek
from tests.remote.conftest import Actor
from tests.remote.meddler import Frames, Meddler, Puppet, changed
from tests.wire.samples import reseal

CASE = "hosfl central"  # z and the scalars as they are
Damage = Callable[[bytes], bytes]


def same(there: dict[str, Any], here: dict[str, Any]) -> None:
    for part in here:
        assert here[part] == there[part], part


def played(run: Any, puppet: Puppet, settings: dict[str, Any], **spec: Any) -> Actor:
    """A run of two clients and a puppet, to its end; the server."""
    server, others = run.server(settings=settings, **spec).start(), [run.client(n).start() for n in ("ann", "bob")]
    puppet.start()
    assert puppet.wait() == "the run is over", server.said
    for actor in (server, *others):
        assert actor.wait() == 0, actor.said
    return server


EVERYBODY = {"clients_per_round": 3}

# ---- messages that are good, at the wrong time


def twice(_: Meddler, frame: bytes) -> Frames:
    return [frame, frame]


def test_what_comes_twice_counts_once(stage: Any, undisturbed: Any) -> None:
    """Either way: every answer, and every request, update and end of a round."""
    run = stage()
    played(run, Puppet(run, "cid", out=twice, into=twice), EVERYBODY)
    same(run.left(), undisturbed("hosfl", **EVERYBODY))
    assert run.figures()["repeated"] > 0
    assert run.figures()["malformed"] == 0


def late_and_early(meddler: Meddler, frame: bytes) -> Frames:
    """All that was sent before, then what is for the next round and the next attempt, and then what is asked for."""
    if peek(frame).kind == "catch_up_request":
        return [frame]
    early = [changed(frame, round=peek(frame).round + 1), changed(frame, attempt=1)]
    return [*meddler.sent[:-1], *early, frame]


def test_what_is_late_or_early_counts_for_nothing(stage: Any, undisturbed: Any) -> None:
    run = stage()
    played(run, Puppet(run, "cid", out=late_and_early), EVERYBODY)
    same(run.left(), undisturbed("hosfl", **EVERYBODY))
    counted = run.figures()
    assert counted["late"] > 0 and counted["early"] >= 6
    assert counted["malformed"] == 0


def test_what_nobody_asked_for_counts_and_ends_the_stream(stage: Any, undisturbed: Any) -> None:
    """Old bytes, other bytes: before a round there is nobody to refuse; the sixteenth ends the stream, not the run."""
    run, garbage = stage(), list[bytes]()

    def out(meddler: Meddler, frame: bytes) -> Frames:
        if garbage:
            return [frame]
        garbage.extend([of_another_run(frame), meddler.hello(), b"", b"HOSF", frame[:-1], flipped(frame), bytes(99)])
        return [frame, *garbage, *garbage, *garbage]

    puppet = Puppet(run, "cid", out=out)
    server = run.server(settings=EVERYBODY).start()
    puppet.start()
    server.wait_to_say("turned out")
    server.wait_to_say("cid is in", times=2)
    others = [run.client(name).start() for name in ("ann", "bob")]
    for actor in (server, *others):
        assert actor.wait() == 0, actor.said
    same(run.left(), undisturbed("hosfl", **EVERYBODY))
    assert run.figures()["malformed"] == 16


class Disorder:
    """What a client hears once in each round before what it should."""

    def __init__(self) -> None:
        self.done: set[tuple[int, str]] = set()

    def __call__(self, meddler: Meddler, frame: bytes) -> Frames:
        kind, place = peek(frame).kind, (peek(frame).round, peek(frame).kind)
        if place in self.done:
            return [frame]
        self.done.add(place)
        match place:
            case 0, "step_request":
                return [flipped(frame)]
            case 0, "multiplier":
                return [frame[:-1]]
            case 1, "step_request":
                early = [old for old in meddler.heard if peek(old).kind == "multiplier"]
                return [early[-1], frame]
            case 1, "multiplier":
                return [changed(frame, client=0)]
            case 0 | 1, "update":
                return [*[old for old in meddler.heard if peek(old).kind == "update"], frame, later(frame), frame]
        assert kind != "snapshot"
        return [frame]


def later(frame: bytes) -> bytes:
    message: Any = decode(frame)
    return changed(frame, round=message.round + 1, step=message.step + 2)


def test_a_client_that_hears_them_in_disorder_begins_its_stream_anew(stage: Any, undisturbed: Any) -> None:
    run, disorder = stage(), Disorder()
    puppet = Puppet(run, "cid", into=disorder)
    server = played(run, puppet, EVERYBODY)
    same(run.left(), undisturbed("hosfl", **EVERYBODY))
    said = "\n".join(puppet.said)
    for words in (
        "ChecksumError",
        "TruncatedError",
        "waits for none",
        "for client 0, this is",
        "OutOfStepError: update",
    ):
        assert words in said, words
    assert server.said.count("cid is in") >= 6


def test_a_client_that_cannot_go_on_says_so_and_nothing_of_its_data(stage: Any, undisturbed: Any) -> None:
    """The round waits for it as long as for any other, and then goes on without it."""

    def out(_: Meddler, frame: bytes) -> Frames:
        if peek(frame).kind == "smashed_data":
            raise RuntimeError("a patient's name")
        return [frame]

    run, settings = stage(), EVERYBODY | {"max_rounds": 1}
    puppet = Puppet(run, "cid", out=out)
    server = run.server(settings=settings, serve={"deadline": 1.0}).start()
    others = [run.client(name).start() for name in ("ann", "bob")]
    puppet.start()
    for actor in (server, *others):
        assert actor.wait() == 0, actor.said
    assert isinstance(puppet.wait(), RuntimeError)
    assert "cid leaves: it cannot go on: RuntimeError" in server.said
    assert "patient" not in server.said
    assert run.figures()["malformed"] == 0
    same(run.left(), undisturbed("hosfl", (2, "smashed_data"), **settings))


# ---- an answer that is damaged


def flipped(frame: bytes) -> bytes:
    data = bytearray(frame)
    data[-len(data) // 4] ^= 4
    return bytes(data)


def renamed(frame: bytes) -> bytes:
    return reseal(frame.replace(b"labels_per_token", b"labels_per_tokem"))


def version(frame: bytes) -> bytes:
    return reseal(frame[:4] + b"\3\0" + frame[6:])


def of_another_run(frame: bytes) -> bytes:
    return encode(decode(frame), bytes(range(16)))


def z(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Another z of as many tokens."""

    def damage(frame: bytes) -> bytes:
        message: Any = decode(frame)
        values = change(message.z.values.clone())
        dtype = str(values.dtype).removeprefix("torch.")
        return changed(frame, z=Coded("fp32", dtype, values.shape[1], values))

    return damage


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return change


def field(name: str, change: Callable[[Any], Any]) -> Damage:
    return lambda frame: changed(frame, **{name: change(getattr(decode(frame), name))})


def longer(frame: bytes) -> bytes:
    """One row, and more tokens than the model has positions."""
    message: Any = decode(frame)
    values = message.z.values[:1].repeat(65, 1)
    one = torch.ones(1, 65, dtype=torch.bool)
    return changed(frame, z=Coded("fp32", "float32", 32, values), labels=torch.ones(65, dtype=torch.int8), mask=one)


def scalars_instead(frame: bytes) -> bytes:
    message: Any = decode(frame)
    instead = ProjectedGradients(message.round, message.client, {}, torch.ones(2), 1, message.attempt)
    return encode(instead, peek(frame).run_id)


SMASHED: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda frame: frame[:-1], "last 1 of"),
    "empty": (lambda frame: b"", "0 bytes are less"),
    "one byte more": (lambda frame: frame + b"\0", "1 bytes follow"),
    "flipped": (flipped, "SHA-256"),
    "keys": (renamed, "labels_per_tokem"),
    "version": (version, "protocol version 3"),
    "another run": (of_another_run, "expected run_id"),
    "another client": (lambda frame: changed(frame, client=1), "expected client 2, got 1"),
    "another kind": (scalars_instead, "it sent a projected_gradients"),
    "dtype of the labels": (field("labels", lambda labels: labels.float()), "labels must be torch.int8"),
    "label": (field("labels", put(-2)), "label -2"),
    "mask": (field("mask", lambda mask: mask[:, :-1].contiguous()), "valid tokens"),
    "columns": (z(lambda z: z[:, :-1].contiguous()), "31 columns, the cut has 32"),
    "dtype": (z(lambda z: z.double()), "float64"),
    "positions": (longer, "65 positions"),
    "nan": (z(put(torch.nan)), "NaN or infinite"),
    "inf": (z(put(-torch.inf)), "NaN or infinite"),
    "1e38": (z(put(1e38)), "1e\\+38"),
}


def basis(frame: bytes) -> bytes:
    message: Any = decode(frame)
    return changed(frame, basis={**message.basis, "distribution": "rademacher"})


SCALARS: dict[str, tuple[Damage, str]] = {
    "nan": (field("coefficients", put(torch.nan)), "NaN or infinite"),
    "inf": (field("coefficients", put(torch.inf)), "NaN or infinite"),
    "1e38": (field("coefficients", put(1e38)), r"coefficient 1 is 1e\+38"),
    "fewer": (field("coefficients", lambda v: v[:1]), r"\[1\] coefficients, the round has \[2\]"),
    "more": (field("coefficients", lambda v: v.repeat(2)), r"\[4\] coefficients, the round has \[2\]"),
    "dtype": (field("coefficients", lambda v: v.double()), "coefficients must be torch.float32"),
    "other directions": (basis, "in the basis .* the round's is"),
    "more terms": (field("num_terms", lambda n: n + 1), "loss terms, its labels have"),
    "empty": (lambda frame: b"", "0 bytes are less"),
}


@pytest.mark.parametrize(("kind", "table"), [("smashed_data", SMASHED), ("projected_gradients", SCALARS)])
def test_a_damaged_answer_is_refused_and_the_round_goes_on(
    kind: str, table: dict[str, tuple[Damage, str]], stage: Any, undisturbed: Any
) -> None:
    """One damage a round: all else is as if that client had not answered."""

    def out(_: Meddler, frame: bytes) -> Frames:
        damage = [damage for damage, _ in table.values()][peek(frame).round]
        return [damage(frame) if peek(frame).kind == kind else frame]

    settings = EVERYBODY | {"max_rounds": len(table)}
    run = stage(CASE)
    server = played(run, Puppet(run, "cid", out=out), settings)
    same(run.left(), undisturbed(CASE, (2, kind), **settings))
    for round, (name, (_, words)) in enumerate(table.items()):
        assert re.search(f"round {round}: client 2 is refused: .*{words}", server.said), name
    assert "cid is gone" not in server.said.partition("round 1:")[0], "nobody waits for a deadline, or loses a stream"
