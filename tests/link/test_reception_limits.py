"""The server's end of the line, alone: what it bounds, whoever is at the other end."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from hosfl_client.limits import METHOD, Limits
from hosfl_lightning.link.reception import Event, Reception


@contextmanager
def receiving(**limits: Any) -> Iterator[Reception]:
    reception = Reception("127.0.0.1:0", limits=Limits(**limits))
    try:
        yield reception
    finally:
        reception.stop()


class Caller:
    """A stream to a reception; what it hears is read only when it is asked for."""

    def __init__(self, reception: Reception) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{reception.port}", options)
        self.outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.call = self.channel.stream_stream(METHOD)(iter(self.outbox.get, None), timeout=20)

    def ended(self) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as error:
            for _ in self.call:
                pass
        return error.value.code()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()
        self.channel.close()


def until(reception: Reception, what: Callable[[Event], bool], seconds: float = 10.0) -> Event:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        event = reception.next(0.1)
        if event is not None and what(event):
            return event
    raise AssertionError("it has not happened")


def test_who_reads_nothing_loses_its_stream() -> None:
    """gRPC takes some of it from us; what is beyond the limit is not kept, and the stream does not wait for it."""
    with receiving(outbox_bytes=1 << 20) as reception, Caller(reception):
        stream = until(reception, lambda event: True).stream
        for _ in range(40):
            reception.send(stream, bytes(1 << 18))
        until(reception, lambda event: event.closed)
        assert stream.outbox.qsize() <= 4


def test_who_is_turned_out_and_reads_nothing_does_not_keep_its_place() -> None:
    with receiving(farewell=0.2) as reception, Caller(reception):
        stream = until(reception, lambda event: True).stream
        for _ in range(40):
            reception.send(stream, bytes(1 << 18))
        reception.close(stream)
        until(reception, lambda event: event.closed)


def test_a_frame_of_one_byte_too_many_ends_its_stream_alone() -> None:
    with receiving(frame_bytes=1000) as reception, Caller(reception) as one, Caller(reception) as other:
        one.outbox.put(bytes(1001))
        assert one.ended() == grpc.StatusCode.RESOURCE_EXHAUSTED
        other.outbox.put(bytes(1000))
        event = until(reception, lambda event: event.frame is not None)
        assert event.frame == bytes(1000)


def test_a_stream_is_not_read_on_before_what_it_sent_is_taken() -> None:
    with receiving(frames_ahead=2) as reception, Caller(reception) as caller:
        for _ in range(50):
            caller.outbox.put(bytes(1 << 16))
        time.sleep(0.3)
        assert reception.bytes_in <= 3 << 16
        for _ in range(50):
            until(reception, lambda event: event.frame is not None)


def test_who_comes_too_often_is_turned_away() -> None:
    with receiving(handshakes=3) as reception:
        for _ in range(3):
            with Caller(reception):
                until(reception, lambda event: event.frame is None and not event.closed)
        with Caller(reception) as fourth:
            assert fourth.ended() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reception.turned_away == 1
