"""The server's end of the line, by a plain gRPC client: order, limits, and how a stream ends."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from hosfl_client.limits import METHOD, Limits
from hosfl_lightning.link.reception import Event, Reception, Stream

AHEAD = 2


@pytest.fixture
def reception() -> Iterator[Reception]:
    reception = Reception("127.0.0.1:0", limits=Limits(frames_ahead=AHEAD, outbox_bytes=1 << 20))
    yield reception
    reception.stop()


@contextmanager
def called(reception: Reception) -> Iterator[tuple[Any, queue.SimpleQueue[bytes | None], Stream]]:
    """A client's call, what it sends, and the stream that the server sees."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{reception.port}") as channel:
        call = channel.stream_stream(METHOD)(iter(outbox.get, None), timeout=20)
        yield call, outbox, taken(reception).stream
        outbox.put(None)
        call.cancel()


def taken(reception: Reception) -> Event:
    event = reception.next(5.0)
    assert event is not None
    return event


def test_no_more_is_read_than_is_taken_and_what_is_taken_makes_room(reception: Reception) -> None:
    with called(reception) as (_, outbox, _):
        for number in range(20):
            outbox.put(bytes([number]))
        until = time.monotonic() + 5
        while reception.bytes_in < AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert reception.bytes_in == AHEAD
        assert [taken(reception).frame for _ in range(20)] == [bytes([number]) for number in range(20)]
        assert reception.next(0.05) is None


def test_frames_arrive_in_their_order_and_then_the_stream_ends(reception: Reception) -> None:
    with called(reception) as (call, _, stream):
        for number in range(200):
            reception.send(stream, bytes([number]))
            if number % 50 == 0:
                time.sleep(0.01)  # the loop is at rest again, and must be woken
        reception.close(stream)
        assert [*call] == [bytes([number]) for number in range(200)]
    assert taken(reception).closed
