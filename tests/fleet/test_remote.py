"""The server's thread and clients that behave badly, or that come at a bad moment: no line, no process."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hosfl_lightning import __version__
from hosfl_lightning.clients.catch_up import load_state, state_digest
from hosfl_lightning.fleet.admission import Admission
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.fleet.member import Membership
from hosfl_lightning.fleet.remote import RemoteFleet
from hosfl_lightning.link.reception import Event, Stream
from hosfl_lightning.optim import SGD, ZerothOrder
from hosfl_lightning.wire import (
    Bye,
    CatchUpRequest,
    HeldOutRequest,
    Hello,
    Message,
    RoundEnd,
    SmashedData,
    Snapshot,
    StepRequest,
    Terms,
    Update,
    decode,
    encode,
)

RUN = bytes(range(16))
NAMES = ["ann", "bob"]


def optimizer() -> ZerothOrder:
    return ZerothOrder([torch.nn.Parameter(torch.arange(6.0))], SGD(lr=0.1), probes=1)


class Line:
    """Stands for the reception: what is put in comes out, what is sent is kept."""

    bytes_in = bytes_out = turned_away = 0

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.sent: dict[Any, list[Message]] = {}
        self.closed: list[Any] = []

    def next(self, timeout: float) -> Event | None:
        return self.events.popleft() if self.events else None

    def send(self, stream: Any, frame: bytes) -> None:
        self.sent.setdefault(stream, []).append(decode(frame))

    def close(self, stream: Any) -> None:
        self.closed.append(stream)

    def stop(self) -> None:
        pass


class Doors:
    """Everybody on the list may come."""

    total = len(NAMES)

    def refresh(self) -> bool:
        return False

    def identify(self, stream: Any) -> tuple[str | None, Any]:
        return None, None

    def number_of(self, name: str) -> int | None:
        return NAMES.index(name) if name in NAMES else None

    def objection(self, name: str, serial: Any) -> str | None:
        return None if name in NAMES else f"{name} is not on the list"


class Server:
    """A fleet without a run, and clients that are a few lines."""

    def __init__(self, membership: Membership | None = None, keeps: bool = True) -> None:
        self.line, self.said, self.replica = Line(), list[str](), optimizer()
        terms = Terms(0, None, "Some", {}, 0, [], {}, {}, {}, keeps)
        channel = Channel(serialize=True)
        channel.run_id = RUN
        endpoint: Any = SimpleNamespace(
            client=SimpleNamespace(optimizer=self.replica), handle=self.move, forget=lambda: None
        )
        line: Any = self.line
        self.admission = Admission(line, Doors(), terms, channel, self.replica, self.say)
        self.fleet = RemoteFleet(endpoint, channel, self.admission, membership or Membership(quorum=1, deadline=0.2))

    def say(self, text: str) -> None:
        text.encode()  # as what a terminal takes
        self.said.append(text)

    def move(self, messages: list[Message]) -> list[Message]:
        if isinstance(messages[0], Update):
            move(self.replica)
        return []

    def hear(self, stream: Any, *messages: Message) -> None:
        """What a client says."""
        self.line.events += [Event(stream, encode(message, RUN)) for message in messages]

    def come(self, name: str, **hello: Any) -> Stream:
        """A client that says hello."""
        nothing: Any = None
        stream = Stream(f"here:{name}", {}, nothing, nothing, [0], nothing)
        self.line.events.append(Event(stream))
        self.hear(stream, Hello(0, **{"name": name, "package": "0", "session": name, "endpoints": ["Some"]} | hello))
        return stream

    def enter(self, name: str, held_out: int = 0) -> Stream:
        """A client that holds what the others hold."""
        stream = self.come(name)
        self.hear(stream, CatchUpRequest(0, NAMES.index(name), 0, "", state_digest(self.replica), held_out))
        self.fleet._pump_all()
        assert NAMES.index(name) in self.fleet.connected
        return stream


def move(held: ZerothOrder) -> None:
    held.record(torch.tensor([1.0]))
    held.step()


def update(step: int) -> Update:
    return Update(step - 1, {}, torch.ones(1), {}, step, [0], [1.0])


def smashed(round: int, client: int, step: int = 0, attempt: int = 0) -> SmashedData:
    z, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    return SmashedData.pack(round, client, z, torch.zeros(1, 2, dtype=torch.long), mask, step=step, attempt=attempt)


@pytest.mark.parametrize("text", ["\ud800", "\x1b[2J", "a\nround 7 begins", "\u202eno"])
def test_what_a_client_says_is_printed_as_it_is_written(text: str) -> None:
    """Half a surrogate pair has no bytes, and an escape would speak to the terminal."""
    server = Server()
    server.come(text)
    server.fleet._pump_all()
    ann = server.come("ann", package=text)
    server.hear(ann, CatchUpRequest(0, 0, 7, text, "another"))
    server.hear(ann, Bye(0, text))
    server.fleet._pump_all()
    assert len(server.said) == 4, server.said
    assert all(line.isprintable() for line in server.said), server.said


def test_versions_are_compared_whoever_has_them() -> None:
    there = Server()
    for name, package in zip(NAMES, (f"hosfl-client {__version__}", "hosfl-client 0.0.0")):
        there.come(name, package=package)
    there.fleet._pump_all()
    told = [line for line in there.said if "runs version" in line]
    assert told == [f"{NAMES[1]} runs version hosfl-client 0.0.0, this server {__version__}"]


def test_who_does_not_know_the_method_is_told_what_does() -> None:
    there = Server()
    there.come(NAMES[0], package="hosfl-client 0.1.0", endpoints=["Other"])
    there.fleet._pump_all()
    [told] = there.said
    assert told.endswith("a Some, which hosfl-client 0.1.0 does not know; take part with hosfl join, of the server's "
                         "version")  # fmt: skip


def test_held_out_data_that_are_late_are_not_trained_on() -> None:
    server = Server()
    ann = server.enter("ann", held_out=1)
    assert [*server.fleet.hold_out(0)] == []
    [asked] = [one for one in server.line.sent[ann] if isinstance(one, HeldOutRequest)]
    server.fleet.refused.clear()
    server.fleet.assemble([0])
    server.hear(ann, smashed(0, 0, attempt=asked.attempt), smashed(0, 0, step=1))
    [taken] = server.fleet.ask({0: StepRequest(0, 0)}, SmashedData)
    assert taken.step == 1
    assert server.fleet.figures()["late"] == 1


def test_who_catches_up_more_slowly_than_rounds_go_comes_in() -> None:
    """An update is made whenever it has begun to read what it lacks."""
    server, held, read = Server(), optimizer(), 0
    bob = server.come("bob")
    server.fleet.tell(update(1), [])
    server.hear(bob, CatchUpRequest(0, 1, 0, "", state_digest(held)))
    for round in range(1, 8):
        server.admission.round = round
        server.fleet._pump_all()
        until = len(server.line.sent[bob])
        server.fleet.tell(update(round + 1), [])
        for message in server.line.sent[bob][read:until]:
            assert not isinstance(message, Bye), message.reason
            match message:
                case Snapshot():
                    load_state(held, message.tensors, message.step)
                case Update():
                    move(held)
                case RoundEnd():
                    server.hear(bob, CatchUpRequest(round, 1, held.steps, "", state_digest(held)))
        read = until
    assert server.fleet.connected == [1]
    for message in server.line.sent[bob][read:]:
        assert isinstance(message, Update)
        move(held)
    assert state_digest(held) == state_digest(server.replica)


def test_a_client_that_never_stops_sending_does_not_stop_the_server() -> None:
    server = Server()
    late, began = Event(server.enter("ann"), encode(smashed(0, 0), RUN)), time.monotonic()

    def more(timeout: float) -> Event:
        assert time.monotonic() < began + 5, "no round begins"
        return late

    server.line.next = more  # type: ignore[method-assign]
    server.fleet.gather_quorum(1, 1)


def test_the_run_is_over_when_all_have_been_told() -> None:
    """The last update of a slow line is still under way, and the farewell behind it."""
    server = Server()
    ann, looks = server.enter("ann"), 0

    def later(timeout: float) -> Event | None:
        nonlocal looks
        looks += 1
        return Event(ann, closed=True) if looks == 100 else None

    server.line.next = later  # type: ignore[method-assign]
    server.line.stop = lambda: server.say(f"stops after {looks}")  # type: ignore[method-assign]
    server.fleet.close("the run is over", over=True)
    assert server.said[-1] == "stops after 100"
    assert isinstance(server.line.sent[ann][-1], Bye)
    assert not any("gone" in line for line in server.said)
