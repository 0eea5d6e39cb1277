"""How clients on other machines come in: who they are, what the run is, and what they have missed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hosfl_lightning import __version__
from hosfl_lightning.clients.catch_up import client_state, state_digest
from hosfl_lightning.fleet.absentees import Returns
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.fleet.member import Member
from hosfl_lightning.link.gate import Gate
from hosfl_lightning.link.reception import Event, Reception, Stream
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.wire import (
    LIMIT,
    Bye,
    CatchUpRequest,
    Hello,
    Message,
    RoundEnd,
    Snapshot,
    Terms,
    Update,
    WireError,
    decode,
    encode,
    peek,
    printable,
)

#: How often a client is brought up to date on one stream before it is told that it cannot be.
TRIES = 3
#: Most bytes of a client's first message.
HELLO_LIMIT = 1 << 20
#: At the end of a run: seconds that the server waits for clients whose line was cut so many seconds ago.
LINGER, LATELY = 5.0, 30.0
#: Likewise: most seconds for what is still to be sent, which a slow line needs.
DELIVERY = 60.0
#: Seconds within which a new stream must say who it is.
SILENCE = 30.0


class Admission:
    """The clients that are there, and those on their way in.

    Args:
        reception: Where streams open, and frames arrive.
        gate: Who may come in.
        terms: What every client is told.
        channel: Counts the messages; its envelopes carry the run's id.
        replica: The optimizer over what clients that are up to date hold.
        notify: Takes what people should hear of.
        bad_frames: Frames of a stream that may be no messages.
        limit: Bytes of a message.

    Attributes:
        members: Who is up to date, by number.
        round: The one that begins next, or is under way.
        records: Answers clients that have missed something; None: a snapshot does.
        counts: What was not taken, by reason.
        counted: At which round and attempt each client's own state counted last.
    """

    def __init__(
        self,
        reception: Reception,
        gate: Gate,
        terms: Terms,
        channel: Channel,
        replica: ZerothOrder,
        notify: Callable[[str], None],
        bad_frames: int = 16,
        limit: int = LIMIT,
    ) -> None:
        self.reception, self.gate, self.terms, self.channel, self.replica = reception, gate, terms, channel, replica
        self.bad_frames, self.limit = bad_frames, limit
        self.notify: Callable[[str], None] = lambda text: notify(printable(text))  # clients' words are among them
        self.members: dict[int, Member] = {}
        self.round = 0
        self.records: Returns | None = None
        self.counts: Counter[str] = Counter()
        self.caught_up: Counter[str] = Counter()
        self.counted: dict[int, tuple[int, int]] = {}
        self._peers: dict[Stream, Member] = {}
        self._sessions: dict[int, str] = {}
        self._cut_off: dict[int, float] = {}
        self._digest: str | None = None
        self._looked = time.monotonic()

    # ---- streams

    def member_of(self, event: Event) -> Member | None:
        """Whose frame an event is; None: it is none, or nobody's any more."""
        if event.closed:
            self._gone(event.stream)
        elif event.frame is None:
            self._came(event.stream)
        else:
            return self._peers.get(event.stream)
        return None

    def send(self, member: Member, frame: bytes) -> None:
        """A frame behind those that wait for the client."""
        self.reception.send(member.stream, frame)

    def turn_out(self, member: Member, reason: str, final: bool = True) -> None:
        """End a client's stream, and say why."""
        self._see_off(member, encode(Bye(self.round, reason, final, failed=final), self.channel.run_id))

    def leave(self, member: Member, message: Bye) -> None:
        """A client says that it goes."""
        self.notify(f"{member.name or member.stream.address} leaves: {message.reason:.300}")
        self._forget(member)
        self.reception.close(member.stream)

    def malformed(self, member: Member, error: WireError) -> None:
        """A frame that is no message here; who sends too many is turned out, and may come back."""
        self.counts["malformed"] += 1
        member.bad += 1
        if member.bad >= self.bad_frames:
            self.notify(f"{member.name or member.stream.address} sends what is no message ({error!s:.200}): turned out")
            self.turn_out(member, f"{member.bad} frames were no messages, the last: {error!s:.200}", final=False)

    def look(self) -> None:
        """Who is not allowed any more, or does not say who it is, leaves."""
        now = time.monotonic()
        if now < self._looked + 0.5:
            return
        self._looked = now
        self.gate.refresh()
        for member in [*self._peers.values()]:
            if member.stage == "new":
                if member.since + SILENCE < now:
                    self.turn_out(member, f"no hello within {SILENCE:g} s", final=False)
            elif (reason := self.gate.objection(member.name, member.serial)) is not None:
                self.notify(f"{member.name} must leave: {reason}")
                self.turn_out(member, reason)

    def close(self, reason: str, over: bool) -> None:
        """Everybody leaves: the run is over, or the server stops and may come back."""
        frame = encode(Bye(self.round, reason, final=over), self.channel.run_id)
        leaving = {*self._peers}
        for member in [*self._peers.values()]:
            self._see_off(member, frame)
        if over:
            self._linger(frame, leaving)
        self.reception.stop()

    def _see_off(self, member: Member, frame: bytes) -> None:
        self._forget(member)
        self.reception.send(member.stream, frame)
        self.reception.close(member.stream)

    def _linger(self, frame: bytes, leaving: set[Stream]) -> None:
        """Who was cut off lately, or is behind, is still told that the run is over: else it would wait for a server."""
        began = now = time.monotonic()
        missing = {client for client, left in self._cut_off.items() if left > now - LATELY}
        while (missing and now < began + LINGER) or (leaving and now < began + DELIVERY):
            event, now = self.reception.next(0.1), time.monotonic()
            if event is not None and event.closed:
                leaving.discard(event.stream)
            member = self.member_of(event) if event is not None else None
            if member is None or event is None or event.frame is None:
                continue
            try:
                hello: Any = decode(event.frame, "hello", limit=HELLO_LIMIT)
            except WireError:
                continue
            missing -= {self.gate.number_of(member.name or hello.name)}
            leaving.add(member.stream)
            self._see_off(member, frame)

    def name_of(self, client: int) -> str:
        """What a client is called, or its number."""
        member = self.members.get(client)
        return member.name if member is not None else f"client {client}"

    # ---- on the way in

    def greet(self, member: Member, event: Event) -> tuple[bool, bool]:
        """What a client says before it is in; whether it is in now, and whether it is another process than before."""
        assert event.frame is not None
        try:
            kind = peek(event.frame, HELLO_LIMIT).kind
            if kind == "bye":
                self.leave(member, decode(event.frame, "bye"))  # type: ignore[arg-type]
            elif member.stage == "new":
                hello: Any = decode(event.frame, "hello", limit=HELLO_LIMIT)
                self._introduce(member, hello)
            else:
                run_id, limit = self.channel.run_id, HELLO_LIMIT
                request: Any = decode(event.frame, "catch_up_request", run_id=run_id, client=member.number, limit=limit)
                self.channel.count(request, "up", len(event.frame))
                return self._bring(member, request)
        except WireError as error:
            self.counts["malformed"] += 1
            self.notify(f"{member.name or member.stream.address} is not let in: {error!s:.200}")
            self.turn_out(member, f"{error!s:.300}")
        return False, False

    def _introduce(self, member: Member, hello: Hello) -> None:
        name = member.name or hello.name
        number, reason = self.gate.number_of(name), None
        if hello.name != name:
            reason = f"the certificate is that of {name}, not of {hello.name:.80}"
        elif number is None:
            reason = f"{name:.80} is not among the clients of this run"
        elif self.terms.endpoint not in hello.endpoints:
            reason = (
                f"the run's clients are a {self.terms.endpoint}, which {hello.package:.40} does not know; take part "
                "with hosfl join, of the server's version"
            )
        else:
            reason = self.gate.objection(name, member.serial)
        if reason is not None or number is None:
            self.counts["turned away"] += 1
            self.notify(f"{name:.80} is not let in: {reason}")
            self.turn_out(member, str(reason))
            return
        for other in [*self._peers.values()]:
            if other is not member and other.number == number:
                self.notify(f"{name} has connected anew: the connection before is closed")
                self.turn_out(other, f"another connection of {name} has taken its place")
        if hello.package.split()[-1:] != [__version__]:  # a device says "hosfl-client" before it
            self.notify(f"{name} runs version {hello.package:.40}, this server {__version__}")
        member.name, member.number, member.session, member.stage = name, number, hello.session, "joining"
        self._tell(member, replace(self.terms, round=self.round, client=number))

    def _bring(self, member: Member, request: CatchUpRequest) -> tuple[bool, bool]:
        """In, if it holds what the others hold; else it is sent what it lacks."""
        member.held_out = request.held_out
        if not self.terms.keeps:
            round, attempt = self.counted.get(member.number, (0, 0))
            counted = [member.number] if member.number in self.counted else []
            self._tell(member, RoundEnd(round, counted, attempt))
            return self._enter(member)
        if request.digest in (self.digest, member.promised):
            return self._enter(member)
        member.tries += 1
        if member.tries > TRIES:
            self.notify(f"{member.name} is not let in: after {TRIES} tries it does not hold what the others hold")
            self.turn_out(
                member, "the state that was sent does not become the same bits here; is the software the same?"
            )
            return False, False
        for message in self._missed(member, replace(request, round=self.round)):
            self._tell(member, message)
        self._tell(member, RoundEnd(self.round, []))  # that was all
        member.promised = self.digest
        return False, False

    def _missed(self, member: Member, request: CatchUpRequest) -> Iterator[Message]:
        """The updates that a client lacks, or a whole state."""
        reason = "it holds nothing yet" if not request.digest else "its state is not that of the others"
        if self.records is not None and request.digest and member.tries == 1:
            answer = self.records.answer(request)
            if isinstance(answer, Snapshot):
                reason = answer.reason
            elif answer is not None:
                self.caught_up["replay"] += 1
                self.notify(f"{member.name} replays the updates from round {request.version} on")
                yield from answer
                return
        self.caught_up["snapshot"] += 1
        self.notify(f"{member.name} is sent a snapshot: {reason}")
        steps, incarnation = self.replica.steps, self.records.incarnation if self.records is not None else ""
        yield Snapshot(self.round, member.number, steps, incarnation, reason, steps, client_state(self.replica))

    def _enter(self, member: Member) -> tuple[bool, bool]:
        member.stage = "in"
        self.members[member.number] = member
        self._cut_off.pop(member.number, None)
        forgotten = self._sessions.get(member.number) != member.session
        self._sessions[member.number] = member.session
        self.notify(f"{member.name} is in ({len(self.members)} of {self.gate.total}), round {self.round}")
        return True, forgotten

    # ---- what everybody heard

    @property
    def followers(self) -> list[Member]:
        """Who hears of every update: also who was just sent a state, or it would be out of date once it is read."""
        return [member for member in self._peers.values() if member.stage == "in" or member.promised is not None]

    def heard(self, message: Update | RoundEnd) -> None:
        """Everybody has moved, or a round without an update has ended."""
        self._digest = None
        if isinstance(message, RoundEnd) and not self.terms.keeps:
            self.counted |= dict.fromkeys(message.counted, (message.round, message.attempt))

    @property
    def digest(self) -> str:
        """Of what a client that is up to date holds."""
        if self._digest is None:
            self._digest = state_digest(self.replica)
        return self._digest

    def state_dict(self) -> dict[str, Any]:
        """What each client's own state must be."""
        return {"counted": {client: [*place] for client, place in self.counted.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.counted = {client: (place[0], place[1]) for client, place in state["counted"].items()}
        self._digest = None

    # ---- the rest

    def _tell(self, member: Member, message: Message) -> None:
        frame = encode(message, self.channel.run_id)
        self.channel.count(message, "down", len(frame))
        self.send(member, frame)

    def _came(self, stream: Stream) -> None:
        member = self._peers[stream] = Member(stream)
        self.gate.refresh()  # who is on the list now: a refusal is final
        try:
            name, member.serial = self.gate.identify(stream)
            member.name = name or ""
            reason = self.gate.objection(name, member.serial) if name else None
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            self.counts["turned away"] += 1
            self.notify(f"{member.name or stream.address} is not let in: {reason}")
            self.turn_out(member, reason)

    def _gone(self, stream: Stream) -> None:
        member = self._peers.get(stream)
        if member is None:
            return
        if member.stage == "in":
            self._cut_off[member.number] = time.monotonic()
            self.notify(f"{member.name} is gone ({len(self.members) - 1} of {self.gate.total} are there)")
        self._forget(member)

    def _forget(self, member: Member) -> None:
        self._peers.pop(member.stream, None)
        if self.members.get(member.number) is member:
            del self.members[member.number]
