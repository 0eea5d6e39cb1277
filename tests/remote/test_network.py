"""Lines that are slow, and many of them."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from hosfl_lightning.fleet.remote import RemoteFleet
from tests.fleet.pipe_client import model_of
from tests.random_tokens import RandomTokens
from tests.remote.conftest import Actor
from tests.remote.crowd import Crowd
from tests.remote.line import Line

EVERYBODY = {"clients_per_round": 3}


def test_a_slow_link_gives_the_same_bits(stage: Any, undisturbed: Any) -> None:
    run = stage()
    line = Line(run.port, bytes_a_second=100_000, delay=0.005)
    server = run.server(settings=EVERYBODY).start()
    slow = {"server": f"127.0.0.1:{line.port}"}
    clients = [run.client(name, **(slow if name == "bob" else {})).start() for name in run.names]
    for actor in (server, *clients):
        assert actor.wait() == 0, actor.said
    line.close()
    here, there = undisturbed("hosfl", **EVERYBODY), run.left()
    for part in here:
        assert here[part] == there[part], part
    assert line.carried > run.figures()["received_bytes"] / 6, "it went by the slow link"


def test_fifty_clients_on_one_server(stage: Any, undisturbed: Any) -> None:
    """All are asked in one round and all answer: as many streams as clients, and no thread for any."""
    lengths, settings = [[5 + k % 7, 4 + k % 5] for k in range(50)], {"max_rounds": 1, "clients_per_round": 50}
    run = stage(names=[f"client-{k}" for k in range(50)])
    server = run.server(settings=settings, lengths=lengths).start()
    model, data = model_of(run.pretrained), RandomTokens(lengths)
    data.tokenizer = model.tokenizer()
    data.setup("fit")
    model.eval()
    assert asyncio.run(Crowd(run.address, model, data).run(run.names)) == ["the run is over"] * 50
    assert server.wait() == 0, server.said
    assert "client-49 is in" in server.said and "(50 of 50)" in server.said
    here, there = undisturbed("hosfl", lengths=lengths, **settings), run.left()
    for part in here:
        assert here[part] == there[part], part


def test_nothing_is_sent_anywhere_but_to_the_server(stage: Any) -> None:
    """In a network where every packet to anywhere is seen. Python is watched as well: it may use files as sockets."""
    run = stage()
    island = Actor(run.nursery, "island", {}, run.folder, "island").start()
    while "ready" not in island.said:
        if island.status is not None:
            assert island.said.startswith("no island: "), island.said  # else it is broken, and not forbidden here
            pytest.skip(island.said.strip())
        time.sleep(0.02)
    server = run.server(island=island.process).start()
    clients = [client.start(island=island.process) for client in run.clients()]
    for actor in (server, *clients):
        assert actor.wait() == 0, actor.said
        assert "audit: " not in actor.said, actor.said
    seen = set(island.said.split("\n")) - {"ready", ""}
    elsewhere = [
        one for one in seen if not re.fullmatch(rf"tcp 127.0.0.1:({run.port} from \d+|\d+ from {run.port})", one)
    ]
    assert len(seen) > 3 and not elsewhere

    stray = Actor(run.nursery, "stray", {"island": island.process}, run.folder, "stray").start()
    assert stray.wait() == 0, stray.said
    assert stray.said.count("audit: socket.connect") == 2
    for words in ("tcp 203.0.113.5:9 ", "udp 203.0.113.5:9 "):
        assert words in island.said, "what goes elsewhere would have been seen"


def test_who_comes_too_often_is_counted_with_who_may_not_come_in() -> None:
    fleet: Any = RemoteFleet.__new__(RemoteFleet)
    reception = SimpleNamespace(turned_away=3, bytes_in=0, bytes_out=0)
    counts, caught_up = Counter({"turned away": 2}), Counter[str]()
    fleet.admission = SimpleNamespace(members={}, counts=counts, caught_up=caught_up, reception=reception)
    assert fleet.figures()["turned_away"] == 5
