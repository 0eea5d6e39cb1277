"""The client's end of the line: a stream to one server, taken up again whenever it is cut."""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hosfl_client.joined import Farewell, Joined, OutOfStepError
from hosfl_client.limits import METHOD, Limits
from hosfl_client.reasons import reason
from hosfl_client.refusals import TermsError
from hosfl_client.wire import Bye, VersionError, WireError

# gRPC writes by itself to the standard error a line for every handshake that fails. GRPC_VERBOSITY=info brings it back.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
import grpc

#: Seconds between two lines that say the same.
EVERY = 60.0


class ServerGoneError(RuntimeError):
    """The server was not to be had for as long as this client waits."""


class TurnedAwayError(RuntimeError):
    """The server does not take this client, and says why."""


@dataclass(frozen=True)
class Backoff:
    """Seconds before the n-th try: ``min(cap, first · 2ⁿ)``, less a random half, so that not all come at once.

    Args:
        first: The shortest.
        cap: The longest.
        give_up: Seconds without a server after which the client ends.
    """

    first: float = 0.2
    cap: float = 15.0
    give_up: float = 600.0

    def seconds(self, tries: int) -> float:
        """Before the next try."""
        return min(self.cap, self.first * 2 ** min(tries, 20)) * random.SystemRandom().uniform(0.5, 1.0)


class Connection:
    """Connects, hands frames to a `Joined`, and its answers back.

    Args:
        server: ``HOST:PORT``; nothing is ever connected to but this.
        credentials: gRPC's, of the client; None: plain text.
        joined: The client.
        limits: Of the line.
        backoff: Between tries.
        options: Further ones of the channel.
    """

    def __init__(
        self,
        server: str,
        credentials: Any | None,
        joined: Joined,
        limits: Limits | None = None,
        backoff: Backoff | None = None,
        options: list[tuple[str, Any]] | None = None,
    ) -> None:
        self.server, self.credentials, self.joined = server, credentials, joined
        self.limits, self.backoff = limits or Limits(), backoff or Backoff()
        self.options = [*self.limits.channel_options(), ("grpc.use_local_subchannel_pool", 1), *(options or [])]
        self.notify: Callable[[str], None] = joined.notify
        self._said = ("", 0.0)  # why there was no line, and when that was said
        self._told = time.monotonic()  # when it was said how far this client is

    def run(self) -> str:
        """Take part until the server says that it is over; what it said.

        Raises:
            ServerGoneError: The server is not to be had.
            TurnedAwayError: It does not take this client.
            TermsError: This client cannot take part in its run.
        """
        tries, seen = 0, time.monotonic()
        while True:
            try:
                heard, why = self._stream()
            except Farewell as farewell:
                self.joined.rest()
                if farewell.bye.final and farewell.bye.failed:
                    raise TurnedAwayError(f"{self.server} says: {farewell.bye.reason:.1000}") from None
                if farewell.bye.final:
                    self.notify(f"took part in {self.joined.rounds} round(s)")
                    return farewell.bye.reason
                heard, why = True, f"it says: {farewell.bye.reason:.300}"
            now = time.monotonic()
            tries, seen = (0 if heard else tries + 1), (now if heard else seen)
            if now - seen > self.backoff.give_up:
                raise ServerGoneError(
                    f"{self.server} was not to be had for {self.backoff.give_up:g} s ({why}); is it up, and is the "
                    "address right? Start this client again when it is: it goes on where it was"
                )
            self._say_lost(why, now)
            time.sleep(self.backoff.seconds(tries))

    def _say_lost(self, why: str, now: float) -> None:
        """Once, and once a minute while it stays so."""
        if why != self._said[0] or now > self._said[1] + EVERY:
            self._said = (why, now)
            self.notify(f"not connected to {self.server}: {why}; trying again")

    def _say_connected(self) -> None:
        self._said, self._told = ("", 0.0), time.monotonic()
        self.notify(f"connected to {self.server}")

    def _say_place(self) -> None:
        if self.joined.terms is not None and self.joined.terms.client is not None:
            self.notify(f"this is client {self.joined.number} of the run")

    def _say_how_far(self) -> None:
        """Once a minute."""
        if time.monotonic() > self._told + EVERY:
            self._told = time.monotonic()
            self.notify(f"took part in {self.joined.rounds} round(s) so far")

    def _stream(self) -> tuple[bool, str]:
        """One stream, from hello to its end: whether anything was understood, and why it ended."""
        outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        heard = False
        with self._channel() as channel:
            call = channel.stream_stream(METHOD)(_frames(outbox))
            outbox.put(self.joined.hello())
            try:
                for frame in call:
                    first = not heard
                    if first:
                        self._say_connected()
                    for answer in self.joined.handle(frame):
                        outbox.put(answer)
                    heard = True
                    if first:
                        self._say_place()
                    self._say_how_far()
                return heard, "the line was cut"
            except grpc.RpcError as error:
                return heard, reason(error, self.credentials is not None)
            except (OutOfStepError, WireError) as error:
                if isinstance(error, VersionError) and not heard:
                    raise TurnedAwayError(
                        f"{self.server}: {error}; hosfl_lightning there and this client must be of one version"
                    ) from error
                self.joined.forget()
                return heard, f"{type(error).__name__}: {error}"
            except Farewell:
                raise
            except BaseException as error:
                self._take_leave(call, outbox, error)
                raise
            finally:
                outbox.put(None)
                call.cancel()

    def _channel(self) -> Any:
        if self.credentials is None:
            return grpc.insecure_channel(self.server, options=self.options)
        return grpc.secure_channel(self.server, self.credentials, options=self.options)

    def _take_leave(self, call: Any, outbox: queue.SimpleQueue[bytes | None], error: BaseException) -> None:
        """Say that this client goes: nothing of its data, which an error may quote."""
        why = str(error) if isinstance(error, TermsError) else type(error).__name__
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        bye = Bye(0, "stopped" if stopped else f"it cannot go on: {why}", failed=not stopped)
        outbox.put(self.joined.bytes_of(bye))
        outbox.put(None)
        self.joined.rest()
        with suppress(Exception):  # the server closes its side when it has read this
            for _ in call:
                pass


def _frames(outbox: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
    while (frame := outbox.get()) is not None:
        yield frame
