"""The line is cut while both sides live: what was computed is not computed again, and nothing is lost."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.remote.conftest import Actor
from tests.remote.line import Line
from tests.remote.test_kills import finished, same


@pytest.mark.parametrize("case", ["hosfl", "splitfed v2"])
def test_the_line_is_cut_in_every_answer(case: str, stage: Any, undisturbed: Any) -> None:
    run = stage(case)
    line = Line(run.port)
    server, seen = run.server().start(), 0
    slow = {"kind": "multiplier", "seconds": 0.2}  # time for the cut
    clients = [client.start(server=f"127.0.0.1:{line.port}", slow=slow) for client in run.clients()]
    until = time.monotonic() + 60
    while "run folder" not in server.said:
        assert time.monotonic() < until and server.status is None, server.said
        if (now := sum(map(len, map(computed, clients)))) > seen:
            line.cut()
            seen = now
        time.sleep(0.02)
    finished(server, *clients)
    line.close()
    same(run, undisturbed)
    assert seen >= 6
    for client in clients:
        assert len(computed(client)) == len(set(computed(client)))


def computed(client: Actor) -> list[str]:
    return [text for text in client.said.splitlines() if text.startswith("computing multiplier")]
