"""The reference: gRPC alone, a server and clients that move frames of given sizes and look at none.

As many messages as a round of ours has, of the same lengths, and the same barriers: every client is asked, then all
answers are awaited. ``checked``: SHA-256 of each frame where it leaves and where it arrives, as our frames have it.
"""

from __future__ import annotations

import asyncio
import os
import queue
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import cycle
from typing import Any

import grpc
import grpc.aio

from benchmarks.remote_children import Talk
from hosfl_client.limits import METHOD

#: A round: what goes down, and what comes up in answer.
EXCHANGES = (("step_request", "smashed_data"), ("multiplier", "projected_gradients"), ("update", None))


def server(clients: int, sizes: dict[str, int], credentials: Any, options: Any, checked: bool, talk: Talk) -> None:
    """Rounds, as many as are ordered, with all clients."""
    asyncio.run(serve(clients, sizes, credentials, options, checked, talk))


async def serve(clients: int, sizes: dict[str, int], credentials: Any, options: Any, checked: bool, talk: Talk) -> None:
    """See `server`."""
    streams: list[Any] = []
    frames = {kind: os.urandom(size) for kind, size in sizes.items()}

    async def enter(_: Any, context: Any) -> None:
        streams.append(context)
        await asyncio.Event().wait()

    async def write(stream: Any, frame: bytes) -> None:
        hashed(frame)
        await stream.write(frame)

    async def read(stream: Any) -> None:
        hashed(await stream.read())

    def hashed(frame: bytes) -> None:
        if checked:
            sha256(frame).digest()

    server = grpc.aio.server(options=options)
    service, _, method = METHOD.strip("/").partition("/")
    handler = {method: grpc.stream_stream_rpc_method_handler(enter)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handler)])
    add = server.add_insecure_port if credentials is None else server.add_secure_port
    port = add("127.0.0.1:0", *([] if credentials is None else [credentials()]))
    await server.start()
    talk.say(port=port)
    while len(streams) < clients:
        await asyncio.sleep(0.01)
    while (order := await asyncio.to_thread(talk.hear)) is not None:
        ends = [time.perf_counter()]
        for _ in range(order["steps"]):
            for down, up in EXCHANGES:
                await asyncio.gather(*(write(stream, frames[down]) for stream in streams))
                if up is not None:
                    await asyncio.gather(*(read(stream) for stream in streams))
            ends.append(time.perf_counter())
        talk.say(ends=ends)


def client(port: int, sizes: dict[str, int], credentials: Any, options: Any, checked: bool, _: Talk) -> None:
    """A client: each frame is answered by the next of its frames."""
    outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def sent() -> Iterator[bytes]:
        while True:
            yield outbox.get()

    answers = cycle([None if up is None else os.urandom(sizes[up]) for _, up in EXCHANGES])
    address = f"127.0.0.1:{port}"
    plain = credentials is None
    channel = grpc.insecure_channel(address, options) if plain else grpc.secure_channel(address, credentials(), options)
    for frame, answer in zip(channel.stream_stream(METHOD)(sent()), answers):
        for checkable in (frame, answer) if checked else ():
            sha256(checkable or b"").digest()
        if answer is not None:
            outbox.put(answer)
