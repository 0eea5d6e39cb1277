"""Clients on other machines, each at the end of a stream of frames."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import override

from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.fleet.absentees import Returns
from hosfl_lightning.fleet.admission import Admission
from hosfl_lightning.fleet.base import Fleet, objection
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.fleet.conversation import Conversation, Exchange
from hosfl_lightning.fleet.member import Member, Membership, listed
from hosfl_lightning.fleet.processes import Processes
from hosfl_lightning.link.reception import Event
from hosfl_lightning.wire import (
    HELD_OUT,
    HeldOutRequest,
    Message,
    RoundEnd,
    SmashedData,
    StepRequest,
    Update,
    Weights,
    WireError,
    checksum,
    decode,
    encode,
    peek,
    printable,
)

#: What was not taken, by reason, since the server began.
COUNTED = ("late", "early", "repeated", "unasked", "malformed", "missed", "spared", "turned away")
#: Batches of a client's validation data that are asked for at most: it says itself how many it has.
MOST_HELD_OUT = 4096
#: Seconds between looks at who is allowed, while nothing happens.
TICK = 0.5


class RemoteFleet(Fleet):
    """What the server's thread does with what arrives; nothing else decides anything.

    A request to a client that is not there waits for it, as long as the deadline lets it; a client that was cut off is
    asked again. An update goes to all that are up to date; who is not catches up when it comes back.

    Args:
        endpoint: Over the server's replica of the client half; it hears what everybody hears.
        channel: Counts the messages; its envelopes carry the run's id.
        admission: Lets clients in.
        membership: Who must be there, and how long is waited.

    Attributes:
        conversations: Of the present attempt, by client.
        take_first: How many answers to a round's first request are enough; None: all.
    """

    simulated = False

    def __init__(self, endpoint: Endpoint, channel: Channel, admission: Admission, membership: Membership) -> None:
        super().__init__(channel, Processes())
        self.endpoint, self.admission, self.membership = endpoint, admission, membership
        self.conversations: dict[int, Conversation] = {}
        self.take_first: int | None = None
        self.place = (0, 0)

    # ---- the conversation

    @property
    def connected(self) -> list[int]:
        """The clients that are there and up to date, ascending."""
        return sorted(self.admission.members)

    @override
    def gather_quorum(self, round: int, asked: int) -> float:
        began = time.monotonic()
        quorum = self.membership.quorum or asked
        self.take_first = asked if self.membership.oversample else None
        self.conversations = {}
        self.admission.round = round
        self._pump_all()
        told = -1
        while len(self.connected) < quorum:
            if len(self.connected) != told:
                told = len(self.connected)
                self.admission.notify(f"round {round} waits: {told} of {quorum} clients are there")
            self._pump(TICK)
        if told >= 0:
            self.admission.notify(f"round {round} begins: {len(self.connected)} clients are there")
        return time.monotonic() - began

    @override
    def assemble(self, clients: Sequence[int]) -> None:
        super().assemble(clients)
        self.conversations = {}

    @override
    def ask(self, requests: Mapping[int, Message], *expected: type[Message]) -> list[Any]:
        asked = [client for client in self.own if client in requests and client not in self.refused]
        for client in asked:
            self._send_request(client, requests[client], expected)
        first = requests[asked[0]] if asked else None
        enough = len(asked)
        if self.take_first and isinstance(first, StepRequest | Weights) and getattr(first, "step", 0) == 0:
            enough = min(enough, self.take_first)
        answers, until = dict[int, Any](), time.monotonic() + self.membership.deadline
        while len(answers) < enough and any(k not in answers and k not in self.refused for k in asked):
            left = until - time.monotonic()
            if left <= 0:
                self._give_up(asked, answers)
                break
            answers |= self._pump(min(left, TICK))
        self._pass_by([k for k in asked if k not in answers and k not in self.refused])
        return [answers[client] for client in asked if client in answers]

    @override
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        frame = encode(message, self.channel.run_id)
        members = self.admission.followers
        if members:
            self.channel.count(message, "down", len(frame), len(members))
        for member in members:
            self.admission.send(member, frame)
        self.endpoint.handle([message])
        self.admission.heard(message)
        self.conversations = {}

    @override
    def abandon(self) -> None:
        self.endpoint.forget()

    @override
    def hold_out(self, round: int) -> Iterator[SmashedData]:
        self._pump_all()
        self.assemble(self.connected)
        held = {client: min(self.admission.members[client].held_out, MOST_HELD_OUT) for client in self.own}
        for step in range(max(held.values(), default=0)):
            requests = {client: HeldOutRequest(round, client, step) for client in held if step < held[client]}
            yield from self.ask(requests, SmashedData)
        self.assemble([])

    @override
    def catches_up_with(self, records: Returns) -> None:
        self.admission.records = records

    @override
    def refuse(self, client: int, reason: str) -> None:
        super().refuse(client, printable(reason))

    @override
    def figures(self) -> dict[str, float]:
        admission = self.admission
        return {
            "connected": len(admission.members),
            **{name.replace(" ", "_"): admission.counts[name] for name in COUNTED},
            "turned_away": admission.counts["turned away"] + admission.reception.turned_away,
            **{f"caught_up_by_{how}": admission.caught_up[how] for how in ("replay", "snapshot")},
            "received_bytes": admission.reception.bytes_in,
            "sent_bytes": admission.reception.bytes_out,
        }

    @override
    def close(self, reason: str, over: bool) -> None:
        self.admission.close(reason, over)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.admission.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.admission.load_state_dict(state)

    # ---- what is sent

    def _send_request(self, client: int, request: Any, expected: Sequence[type[Message]]) -> None:
        frame = encode(request, self.channel.run_id)
        self.place = place_of(request)
        self.conversations.setdefault(client, Conversation()).ask(Exchange(request, frame, expected))
        member = self.admission.members.get(client)
        if member is not None:
            self._count_and_send(member, request, frame)

    def _count_and_send(self, member: Member, request: Message, frame: bytes) -> None:
        self.channel.count(request, "down", len(frame))
        self.admission.send(member, frame)

    def _ask_again(self, member: Member, forgotten: bool) -> None:
        conversation = self.conversations.get(member.number)
        if conversation is None or member.number in self.refused:
            return
        frames = conversation.again(forgotten)
        for exchange, frame in zip(conversation.exchanges[conversation.answered :], frames):
            self._count_and_send(member, exchange.request, frame)

    # ---- what arrives

    def _pump_all(self) -> None:
        """Take what has arrived; not for ever, as a client that never stops sending would have it."""
        until = time.monotonic() + TICK
        while self._pump(0.0) is not _NOTHING and time.monotonic() < until:
            pass

    def _pump(self, timeout: float) -> Mapping[int, Any]:
        """Take one event, if there is one within so many seconds; an answer that it completes, by client."""
        event = self.admission.reception.next(timeout)
        self.admission.look()
        if event is None:
            return _NOTHING
        member = self.admission.member_of(event)
        if member is None:
            return {}
        if member.stage == "in":
            return dict(self._answer(member, event))
        back, forgotten = self.admission.greet(member, event)
        if back:
            self._ask_again(member, forgotten)
        return {}

    def _answer(self, member: Member, event: Event) -> Iterator[tuple[int, Any]]:
        assert event.frame is not None
        frame, client = event.frame, member.number
        try:
            address = None if peek(frame, self.admission.limit).kind == "bye" else client
            message: Any = decode(frame, run_id=self.channel.run_id, client=address, limit=self.admission.limit)
        except WireError as error:
            self._bad(member, error)
            return
        if message.kind == "bye":
            self.admission.leave(member, message)
            return
        if message.kind == "catch_up_request":
            return  # it is up to date
        conversation = self.conversations.get(client)
        place = place_of(message)
        self.channel.count(message, "up", len(frame))
        if place != self.place or conversation is None:
            self.admission.counts["late" if place < self.place or conversation is None else "early"] += 1
            return
        if conversation.knows(frame):
            self.admission.counts["repeated"] += 1
            return
        exchange = conversation.awaited
        if exchange is None:
            self.admission.counts["unasked"] += 1
            return
        conversation.answered += 1
        known, exchange.digest = exchange.digest, checksum(frame)
        reason = objection(exchange.request, message, exchange.expected)
        if reason is None and known not in (None, exchange.digest):
            reason = "it came back and answers with other bits than before"
        if client in self.refused:
            return
        if reason is not None:
            self.refuse(client, reason)
        elif known is None:
            yield client, message

    def _bad(self, member: Member, error: WireError) -> None:
        self.admission.malformed(member, error)
        conversation = self.conversations.get(member.number)
        if conversation is not None and conversation.awaited is not None:
            self.refuse(member.number, str(error))

    # ---- who does not answer

    def _give_up(self, asked: Sequence[int], answers: Mapping[int, Any]) -> None:
        for client in asked:
            if client not in answers and client not in self.refused:
                there = "it is connected" if client in self.admission.members else "it is not connected"
                self.refuse(client, f"no answer within {self.membership.deadline:g} s ({there})")
                self.admission.counts["missed"] += 1

    def _pass_by(self, slower: Sequence[int]) -> None:
        """Others were faster: they leave this round without blame."""
        if slower:
            names = [self.admission.name_of(client) for client in slower]
            self.admission.notify(f"round {self.place[0]} goes on without {listed(names)}: others were faster")
            self.admission.counts["spared"] += len(slower)
        for client in slower:
            self.conversations.pop(client, None)
        self.own = [client for client in self.own if client not in slower]


def place_of(message: Any) -> tuple[int, int]:
    """Round and attempt, in the order of time: what is held out is asked for before the round's first attempt."""
    attempt = getattr(message, "attempt", 0)
    return message.round, -1 if attempt == HELD_OUT else attempt


_NOTHING: Mapping[int, Any] = {}
