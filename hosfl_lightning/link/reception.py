"""The server's end of the line: streams of frames in, events out, in a thread of their own."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hosfl_client.limits import METHOD, Limits
from hosfl_lightning.link.extra import remote_extra

with remote_extra():
    import grpc
    import grpc.aio


class ListenError(ValueError):
    """The address cannot be listened at."""


class Credit:
    """How many more frames of a stream may be read; the loop is only woken where it waits for one.

    Args:
        left: At first.
    """

    def __init__(self, left: int) -> None:
        self._left, self._lock, self._loop = left, threading.Lock(), asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> None:
        """Once there is one; in the loop, by one task."""
        with self._lock:
            if self._left:
                self._left -= 1
                return
            waiter = self._waiter = self._loop.create_future()
        await waiter

    def give(self) -> None:
        """One more, from any thread."""
        with self._lock:
            waiter, self._waiter = self._waiter, None
            self._left += waiter is None
        if waiter is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(_wake, waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # the stream may have ended
        waiter.set_result(None)


@dataclass(frozen=True, eq=False)
class Stream:
    """One client's connection.

    Attributes:
        address: Of the other end, as gRPC says it.
        auth: What its certificate says, by gRPC's names; empty without one.
    """

    address: str
    auth: dict[str, list[bytes]]
    credit: Credit
    outbox: asyncio.Queue[bytes | None]
    waiting: list[int]
    """Bytes in the outbox, one number."""
    cut: asyncio.Event
    """The other end does not read: nothing more is sent, whatever waits."""


@dataclass(frozen=True)
class Event:
    """Something that happened on a stream: it opened, ``frame`` arrived, or it ``closed``."""

    stream: Stream
    frame: bytes | None = None
    closed: bool = False


class Reception:
    """A gRPC server without a word of the protocol: it hands frames on, and reads no more than are taken.

    Everything is decided by the thread that calls `next`; here is only input and output.

    Args:
        address: ``HOST:PORT``; port 0: any that is free.
        credentials: gRPC's, of the server; None: plain text.
        limits: Of every line.

    Attributes:
        port: Where it listens.
        turned_away: Streams that were not let in: too many, or too often.

    Raises:
        ListenError: The address is taken, or none.
    """

    def __init__(self, address: str, credentials: Any | None = None, limits: Limits | None = None) -> None:
        self.limits, self._credentials, self._address = limits or Limits(), credentials, address
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._orders: deque[tuple[Stream, bytes | None]] = deque()
        self._ordered = False  # whether the loop is about to look at them
        self._open: set[Stream] = set()
        self._recent: dict[str, deque[float]] = {}
        self.turned_away = 0
        self.bytes_in = self.bytes_out = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hosfl-reception", daemon=True)
        self._thread.start()
        try:
            self.port: int = self._run(self._start()).result()
        except BaseException:
            self._end()
            raise

    # ---- for the thread that decides

    def next(self, timeout: float) -> Event | None:
        """The next event; None: there was none for so many seconds."""
        try:
            event = self._events.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if event.frame is not None:
            event.stream.credit.give()
        return event

    def send(self, stream: Stream, frame: bytes) -> None:
        """Put a frame behind what waits to be sent; a client that does not read loses its stream."""
        self._order(stream, frame)

    def close(self, stream: Stream) -> None:
        """End a stream once what waits is sent."""
        self._order(stream, None)

    def stop(self) -> None:
        """End all streams and the server."""
        if self._loop.is_closed():
            return
        with suppress(Exception):
            self._run(self._stop()).result(timeout=10)
        self._end()

    # ---- in the thread of the loop

    async def _start(self) -> int:
        options = [*self.limits.channel_options(), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=options)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service, _, method = METHOD.strip("/").partition("/")
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise ListenError(f"--listen: {self._address} cannot be listened at; is it taken? ({error})") from error
        if not port:
            raise ListenError(f"--listen: {self._address} cannot be listened at; is it taken?")
        await self._server.start()
        return port

    async def _serve(self, _: Any, context: Any) -> None:
        address = context.peer()
        if not self._may_enter(address):
            self.turned_away += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many connections, or too often; come later")
        auth = {name: list(values) for name, values in context.auth_context().items()}
        stream = Stream(address, auth, Credit(self.limits.frames_ahead), asyncio.Queue(), [0], asyncio.Event())
        self._open.add(stream)
        self._events.put(Event(stream))
        reader = asyncio.ensure_future(self._read(stream, context))
        writer = asyncio.ensure_future(self._write(stream, context))
        cut = asyncio.ensure_future(stream.cut.wait())
        try:
            await asyncio.wait([reader, writer, cut], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, writer, cut):
                task.cancel()
            self._open.discard(stream)
            self._events.put(Event(stream, closed=True))

    async def _read(self, stream: Stream, context: Any) -> None:
        while True:
            await stream.credit.take()
            frame = await context.read()
            if frame is grpc.aio.EOF:
                return
            self.bytes_in += len(frame)
            self._events.put(Event(stream, frame))

    async def _write(self, stream: Stream, context: Any) -> None:
        while (frame := await stream.outbox.get()) is not None:
            await context.write(frame)
            self.bytes_out += len(frame)
            stream.waiting[0] -= len(frame)

    def _fill(self) -> None:
        """Everything that is ordered into the outboxes, in its order."""
        self._ordered = False  # first: what is ordered from now on wakes the loop again
        while self._orders:
            stream, frame = self._orders.popleft()
            stream.waiting[0] += len(frame or b"")
            if stream.waiting[0] > self.limits.outbox_bytes:
                stream.cut.set()
                continue
            stream.outbox.put_nowait(frame)
            if frame is None:
                self._loop.call_later(self.limits.farewell, stream.cut.set)

    def _may_enter(self, address: str) -> bool:
        """``ipv4:1.2.3.4:5`` may enter as often a minute as the limit says; ports do not count."""
        now, peer = time.monotonic(), address.rpartition(":")[0]
        recent = self._recent.setdefault(peer, deque())
        while recent and recent[0] < now - 60:
            recent.popleft()
        if len(self._open) >= self.limits.streams or len(recent) >= self.limits.handshakes:
            return False
        recent.append(now)
        if len(self._recent) > 4 * self.limits.streams:
            self._recent = {who: times for who, times in self._recent.items() if times and times[-1] >= now - 60}
        return True

    async def _stop(self) -> None:
        for stream in self._open:
            stream.outbox.put_nowait(None)
        await asyncio.sleep(0)
        await self._server.stop(grace=2)

    def _run(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _order(self, stream: Stream, frame: bytes | None) -> None:
        """Many frames wake the loop once: each time it is woken, it and this thread contend for the interpreter."""
        self._orders.append((stream, frame))
        if not self._ordered:
            self._ordered = True
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._fill)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()
