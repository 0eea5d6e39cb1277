"""Clients elsewhere, whose noise only they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hosfl_lightning.privacy import Privacy
from tests.remote.test_kills import fallen, finished, holds_what_the_server_holds


def test_who_is_asked_again_gives_the_same_noise(stage: Any) -> None:
    """The log's records are witnesses, which a server and a client that were killed must make again to the bit."""
    run, settings = stage(), {"clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}
    deaths = [{"round": 1, "stage": "end", "flag": str(run.folder / "died")}]
    server = run.server(deaths=deaths, privacy=settings).start()
    ann, *others = (client.start() for client in run.clients())
    fallen([server])
    ann.kill()
    ann.wait()
    server.start()
    ann.start()
    finished(server, ann, *others)
    holds_what_the_server_holds(run, run.names)
    keys = {(Path(one.spec["state"]) / "noise.key").read_bytes() for one in (ann, *others)}
    assert len(keys) == len(run.names)
    # Which examples are in a client's minibatch only it knows: each of its answers counts.
    costs = [float(row["privacy/epsilon"]) for row in run.rows() if row["privacy/epsilon"]]
    spent = [Privacy(**settings).spent(answers) for answers in range(1, 4)]
    assert all(any(cost == pytest.approx(one) for one in spent) for cost in costs) and costs == sorted(costs)
