"""One client sends ten thousand frames that are no messages: they are counted, nothing of them stays, a run goes on."""

from __future__ import annotations

import asyncio
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio

from hosfl_client.limits import METHOD
from hosfl_lightning.wire import WireError, decode, encode, peek
from tests.remote.meddler import Frames, Puppet
from tests.wire.samples import every_form
from tests.wire.test_fuzz import MUTATIONS, mended

FRAMES = 10_000
NAMES = ["ann", "bob", "cid", "mal"]
WELCOME = ("hello", "catch_up_request")


class Mutants:
    """Damaged frames, none of which is a message of the run.

    Args:
        frames: Sound ones.
    """

    def __init__(self, frames: Frames) -> None:
        self.draw = random.Random(0)
        self.frames = frames
        self.made = 0

    def next(self) -> bytes:
        while True:
            mutant = bytearray(self.draw.choice(self.frames))
            self.draw.choice(MUTATIONS)(self.draw, mutant, self.draw.choice(self.frames))
            data = mended(self.draw, bytes(mutant)) if self.draw.random() < 0.5 else bytes(mutant)
            try:
                decode(data)
            except WireError:
                self.made += 1
                return data

    def some(self, count: int) -> Frames:
        return [self.next() for _ in range(count)]


async def say(address: str, frames: Frames) -> None:
    """On a stream of its own, to its end."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream(METHOD)()
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for frame in frames:
                await call.write(frame)
            while await call.read() is not grpc.aio.EOF:
                pass


async def flood(address: str, welcome: Frames, mutants: Mutants, frames: int) -> None:
    """By two that do not say who they are, and by one that is let in each time, until so many are sent."""

    async def outside() -> None:
        while mutants.made < frames:
            await say(address, mutants.some(1))

    async def inside() -> None:
        while mutants.made < frames:
            await say(address, [*welcome, *mutants.some(16)])

    await asyncio.gather(outside(), outside(), inside())


def resident(process: int) -> float:
    """MiB of memory."""
    [kib] = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(kib) / 1024


def test_ten_thousand_damaged_frames(stage: Any, undisturbed: Any) -> None:
    """Before the rounds from all sides, and in each round in the place of every answer."""
    settings = {"max_rounds": 6, "clients_per_round": 4}
    run = stage(names=NAMES)
    server = run.server(settings=settings, limits={"handshakes": 1 << 20}).start()
    others = [run.client(name).start() for name in ("ann", "bob")]

    first = Puppet(run, "mal", index=0)
    welcome = [first.joined.hello()]
    first.start()
    server.wait_to_say("mal is in")
    welcome += first.joined.sent
    mutants = Mutants([*welcome, *(encode(m, first.joined.run_id) for seed in (0, 2) for m in every_form(seed))])

    asyncio.run(flood(run.address, welcome, mutants, 1000))
    before = resident(server.process)
    asyncio.run(flood(run.address, welcome, mutants, FRAMES))
    grown = resident(server.process) - before
    assert "another connection of mal" in str(first.wait())

    mal = Puppet(
        run, "mal", out=lambda joined, frame: [frame] if peek(frame).kind in WELCOME else mutants.some(12), index=0
    )
    mal.start()
    others.append(run.client("cid").start())
    for actor in (server, *others):
        assert actor.wait() == 0, actor.said
    assert run.left()["state"] == undisturbed("hosfl", **settings | {"clients_per_round": 3})["state"]
    counted = run.figures()
    print(counted, grown, mutants.made, mal.said[-3:])
    assert grown < 16
    assert counted["malformed"] > 0.9 * FRAMES
    assert len(re.findall("client 3 is refused: ", server.said)) == settings["max_rounds"]
