"""Many clients in one thread: raw streams, and one endpoint that computes for all of them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
from lightning.fabric import Fabric

from hosfl_client.limits import METHOD
from hosfl_lightning import __version__
from hosfl_lightning.clients import Endpoint, Minibatches
from hosfl_lightning.clients.catch_up import state_digest
from hosfl_lightning.wire import CatchUpRequest, Hello, decode, encode, peek


class Crowd:
    """Clients that answer, as `hosfl_lightning.clients.joined.Joined` would.

    Args:
        address: Of the server.
        model: What all of them hold.
        data: Whose clients they are.
    """

    def __init__(self, address: str, model: Any, data: Any) -> None:
        self.address, self.model, self.data = address, model, data
        self.endpoint: Any = None
        self.moved = -1

    async def run(self, names: list[str]) -> list[str]:
        """What the server said to each at the end."""
        self.ended = 0
        return [*await asyncio.gather(*map(self.one, names))]

    async def one(self, name: str) -> str:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        async with grpc.aio.insecure_channel(self.address, options=options) as channel:
            call = channel.stream_stream(METHOD)(wait_for_ready=True)
            await call.write(encode(Hello(0, name, __version__, name, sorted(Endpoint.known))))
            number, run_id = -1, b""
            while True:
                frame = await call.read()
                match message := decode(frame):
                    case _ if message.kind == "bye":
                        return str(message.reason)  # type: ignore[union-attr]
                    case _ if message.kind == "terms":
                        number, run_id = int(message.client), peek(frame).run_id  # type: ignore[union-attr,arg-type]
                        await call.write(encode(self.holds(message, number), run_id))
                    case _ if message.kind in ("update", "round_end"):
                        if message.round > self.moved:
                            self.moved = message.round
                            self.endpoint.handle([message])
                    case _:
                        [answer] = self.endpoint.handle([message])
                        await call.write(encode(answer, run_id))

    def holds(self, terms: Any, number: int) -> CatchUpRequest:
        if self.endpoint is None:
            self.endpoint = Endpoint.of(
                self.model, Minibatches(self.data, self.model), terms, Fabric(accelerator="cpu", devices=1)
            )
            self.endpoint.checks = False
        return CatchUpRequest(terms.round, number, 0, "", state_digest(self.endpoint.client.optimizer))
