"""The server's end of a line whose other end reads nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest

from hosfl_lightning.link.limits import METHOD, Limits
from hosfl_lightning.link.reception import Event, Reception, Stream

FRAME = bytes(1 << 18)


@contextmanager
def deaf(limits: Limits) -> Iterator[tuple[Reception, Stream]]:
    """A reception and the stream of a client that says a word and does not listen."""
    reception, end = Reception("127.0.0.1:0", limits=limits), threading.Event()

    def words() -> Iterator[bytes]:
        yield b"hello"
        end.wait(60)

    with grpc.insecure_channel(f"127.0.0.1:{reception.port}") as channel:
        call = channel.stream_stream(METHOD)(words())
        yield reception, until(reception, lambda event: event.frame == b"hello").stream
        end.set()
        call.cancel()
    reception.stop()


def until(reception: Reception, good: Callable[[Event], bool]) -> Event:
    last = time.monotonic() + 10
    while time.monotonic() < last:
        event = reception.next(0.1)
        if event is not None and good(event):
            return event
    raise AssertionError("it does not happen")


@pytest.mark.parametrize("limits", [Limits(outbox_bytes=1 << 23), Limits(farewell=0.5)], ids=["too much", "its end"])
def test_who_reads_nothing_loses_its_stream(limits: Limits) -> None:
    """When more waits than may, or when the stream is to end: what waits is never read."""
    with deaf(limits) as (reception, stream):
        for _ in range(128):
            reception.send(stream, FRAME)
        if limits.outbox_bytes > 128 * len(FRAME):
            reception.close(stream)
        assert until(reception, lambda event: event.closed).stream is stream
        reception.send(stream, FRAME)  # nobody is there: no harm
