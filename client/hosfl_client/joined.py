"""A client of a run elsewhere: frames in, frames out, whatever carries them and whatever engine computes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hosfl_client.own_state import OwnState, State
from hosfl_client.refusals import CatchUpError, EndpointError
from hosfl_client.wire import LIMIT, Bye, CatchUpRequest, HeldOutRequest, Hello, Terms, checksum, peek, printable


class Answering(Protocol):
    """What an engine answers with: one client's part of a run, of which this file knows no more.

    Attributes:
        held_out_batches: Batches of validation data that are its own.
    """

    held_out_batches: int

    @property
    def version(self) -> int:
        """Updates that it holds."""

    def handle(self, requests: Sequence[Any]) -> list[Any]:
        """The answer to the one request; none to what is for everybody.

        Raises:
            EndpointError: It does not follow from those before it.
        """

    def hold_out(self, request: HeldOutRequest) -> list[Any]:
        """z of a batch of its validation data."""

    def forget(self) -> None:
        """Drop whatever is held of a round."""

    def shared_state(self) -> Mapping[str, Any]:
        """What all clients hold at this version: the arrays of a `Snapshot`."""

    def load_shared(self, state: Mapping[str, Any], version: int) -> None:
        """Go on from a `shared_state`.

        Raises:
            CatchUpError: It is of other tensors. Nothing has moved then.
        """

    def digest(self) -> str:
        """SHA-256 of the version and of the bits of a `shared_state`: what clients that are up to date agree on."""

    def own_state(self, client: int) -> State | None:
        """What this client alone knows of its part in the round, which the server has not counted; None: nothing."""

    def load_own(self, client: int, state: State | None) -> None:
        """Go on from an `own_state` that counts; None: begin anew."""


Build = Callable[[Terms], Answering]
"""Makes the client's part of a run from its terms, its own model and its own data."""


class Farewell(Exception):
    """The server has ended the stream, and says why.

    Attributes:
        bye: Its words.
    """

    def __init__(self, bye: Bye) -> None:
        super().__init__(bye.reason)
        self.bye = bye


class OutOfStepError(RuntimeError):
    """A message does not follow from those before it: the stream must begin anew."""


class Joined:
    """The client's side of the protocol.

    ::

        →  Hello
        ←  Terms            the model is built, the state of the disk is read
        →  CatchUpRequest   what it holds
        ←  Update … | Snapshot, RoundEnd →  CatchUpRequest, until it holds what the others hold
        ←  requests, each answered once; one that comes again is answered from what was computed
        ←  Update | RoundEnd
        ↔  Bye

    Args:
        name: As in the client's certificate.
        package: Version of the software.
        build: Makes the endpoint.
        endpoints: What it can run, by the names that `Terms.endpoint` gives.
        frames: A `hosfl_client.wire.Frames`: messages as bytes, for the engine's arrays.
        state: What is kept on the disk; None: nothing.
        save_every: Updates from one write of the shared state to the next.
        notify: Takes what people should hear of.

    Raises:
        ValueError: ``save_every`` is below 1.

    Attributes:
        endpoint: Once the terms are known.
        version: Updates that it holds.
        rounds: How often it took part in one.
    """

    def __init__(
        self,
        name: str,
        package: str,
        build: Build,
        endpoints: Sequence[str],
        frames: Any,
        state: OwnState | None = None,
        save_every: int = 10,
        notify: Callable[[str], None] = print,
    ) -> None:
        if save_every < 1:
            raise ValueError(f"save_every must be >= 1, got {save_every}: updates from one write to the next")
        self.name, self.package, self.build, self.state = name, package, build, state
        self.endpoints, self.frames = endpoints, frames
        self.save_every, self.notify = save_every, notify
        self.session = secrets.token_hex(16)
        self.endpoint: Answering | None = None
        self.terms: Terms | None = None
        self.run_id = bytes(16)
        self.incarnation = ""
        self.rounds = 0
        self._answered: tuple[bytes, bytes] | None = None  # checksum of the last request, and the answer's frame
        self._moved = False  # since it said what it holds
        self._last_round = -1
        self._welcome = False  # the next RoundEnd says which own state counts
        self._pending: tuple[int, int] | None = None  # round and attempt of an own state that may count
        self._counted: tuple[int, int] | None = None

    @property
    def number(self) -> int:
        """Its number in the run."""
        assert self.terms is not None and self.terms.client is not None
        return self.terms.client

    @property
    def version(self) -> int:
        """Updates that it holds."""
        return self.endpoint.version if self.endpoint is not None else 0

    def hello(self) -> bytes:
        """The first frame of a stream."""
        return self.bytes_of(Hello(self.version, self.name, self.package, self.session, [*self.endpoints]), bytes(16))

    def forget(self) -> None:
        """What was asked in this round is lost: the server must ask all of it again."""
        self.session, self._answered = secrets.token_hex(16), None
        if self.endpoint is not None:
            self.endpoint.forget()

    def handle(self, frame: bytes) -> list[bytes]:
        """The answers to a frame, none or one.

        Raises:
            Farewell: The stream is over.
            WireError: It is no message for here.
            OutOfStepError: It does not follow from those before it.
            TermsError: This client cannot take part.
        """
        kind = peek(frame, LIMIT).kind
        if kind == "bye":
            bye = self.frames.decode(frame, "bye")
            raise Farewell(replace(bye, reason=printable(bye.reason)))
        if kind == "terms":
            return [self.bytes_of(self._join(self.frames.decode(frame, "terms"), peek(frame).run_id))]
        if self.terms is None or self.endpoint is None:
            raise OutOfStepError(f"a {kind} before the terms of the run")
        message = self.frames.decode(frame, run_id=self.run_id)
        if getattr(message, "client", None) not in (None, self.number):
            raise OutOfStepError(f"a {kind} for client {message.client}, this is client {self.number}")
        match kind:
            case "update":
                self._follow(message)
            case "snapshot":
                self._take(message)
            case "round_end":
                return [self.bytes_of(reply) for reply in self._end(message)]
            case _:
                return [self._answer(message, frame)]
        return []

    # ---- on the way in

    def _join(self, terms: Terms, run_id: bytes) -> CatchUpRequest:
        same = self.terms is not None and run_id == self.run_id and terms.endpoint == self.terms.endpoint
        if not same or self.endpoint is None:
            self.terms, self.run_id = terms, run_id
            self.endpoint, self._answered = self.build(terms), None
            self.incarnation, self._last_round, self._pending, self._counted = "", -1, None, None
            self._restore()
        return self._holds(terms.round)

    def _restore(self) -> None:
        assert self.endpoint is not None and self.terms is not None
        held = self.state.shared(self.run_id) if self.state is not None and self.terms.keeps else None
        if held is not None:
            state, version, incarnation = held
            try:
                self.endpoint.load_shared(state, version)
                self.incarnation = incarnation
            except CatchUpError as error:
                self.notify(f"what is on this client's disk is passed over: {error}")

    def _holds(self, round: int) -> CatchUpRequest:
        assert self.endpoint is not None and self.terms is not None
        self._moved, self._welcome = False, not self.terms.keeps
        digest = self.endpoint.digest() if self.terms.keeps else ""
        return CatchUpRequest(
            round, self.number, self.version, self.incarnation, digest, self.endpoint.held_out_batches
        )

    def _take(self, snapshot: Any) -> None:
        assert self.endpoint is not None
        self.endpoint.forget()
        self.endpoint.load_shared(snapshot.tensors, snapshot.step)
        self.incarnation, self._moved, self._answered = snapshot.incarnation, True, None
        self._save()

    # ---- the rounds

    def _follow(self, update: Any) -> None:
        assert self.endpoint is not None
        if update.step <= self.version:
            return  # no update is applied twice
        if update.step > self.version + 1:
            raise OutOfStepError(f"update {update.step}, this client holds {self.version}")
        self.endpoint.handle([update])
        self.incarnation, self._moved, self._answered = update.incarnation, True, None
        if self.version % self.save_every == 0:
            self._save()

    def _end(self, message: Any) -> list[Any]:
        assert self.endpoint is not None and self.terms is not None
        if self.terms.keeps:
            self._answered = None
            self.endpoint.handle([message])
            return [self._holds(message.round)] if self._moved else []
        self._own(message)
        return []

    def _own(self, message: Any) -> None:
        """What this client did in a round counts, or did not; on the way in: which state of its own counts."""
        assert self.endpoint is not None
        place, counts = (message.round, message.attempt), self.number in message.counted
        if not self._welcome or (counts and place == self._pending):
            self._answered = None
            self.endpoint.handle([message])
            self._counted, self._pending = (place if counts else self._counted), None
        elif counts and place != self._counted:
            held = self.state.own(self.run_id, place) if self.state is not None else None
            if held is None:
                self.notify(f"what this client kept after round {place[0]} is lost: its moments begin anew")
            self.endpoint.load_own(self.number, held)
            self._counted = place
        elif not counts and self._counted is not None:
            self.endpoint.load_own(self.number, None)
            self._counted = None
        self._welcome = False

    def _answer(self, request: Any, frame: bytes) -> bytes:
        assert self.endpoint is not None
        key = checksum(frame)  # `handle` has verified it
        if self._answered is not None and self._answered[0] == key:
            return self._answered[1]
        if isinstance(request, HeldOutRequest):
            [answer] = self.endpoint.hold_out(request)
        else:
            try:
                [answer] = self.endpoint.handle([request])
            except EndpointError as error:
                raise OutOfStepError(str(error)) from error
            if request.round != self._last_round:
                self._last_round, self.rounds = request.round, self.rounds + 1
        self._keep(request)
        answered = self.bytes_of(answer)
        self._answered = key, answered
        return answered

    def _keep(self, request: Any) -> None:
        """What only this client knows of its part in the round, before the server can count on it."""
        assert self.endpoint is not None
        own = self.endpoint.own_state(self.number)
        if own is not None and self.state is not None:
            self.state.save_own(own, self.run_id, (request.round, request.attempt))
        self._pending = (request.round, request.attempt) if own is not None else None

    def _save(self) -> None:
        if self.state is not None and self.endpoint is not None:
            self.state.save_shared(self.endpoint.shared_state(), self.run_id, self.version, self.incarnation)

    def rest(self) -> None:
        """Keep what is held: the stream is over."""
        if self.endpoint is not None and self.terms is not None and self.terms.keeps:
            self.endpoint.forget()
            self._save()

    def bytes_of(self, message: Any, run_id: bytes | None = None) -> bytes:
        """A message as one frame, of the run it takes part in."""
        return self.frames.encode(message, self.run_id if run_id is None else run_id)
