"""Kills at random for as long as is asked: the state at the end is that of a run that was never disturbed.

pytest tests/remote/test_soak.py --soak 1800 -s
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hosfl_lightning import Orchestrator
from hosfl_lightning.server.replay_log import ReplayLog
from tests.fleet.pipe_client import model_of
from tests.fleet.test_pipe import CASES
from tests.random_tokens import RandomTokens
from tests.remote.actors import lengths

NAMES = [f"site-{k}" for k in range(8)]
SETTINGS: dict[str, Any] = {"clients_per_round": 4, "val_check_interval": 10}


def test_kills_at_random(stage: Any, request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> None:
    seconds = request.config.getoption("--soak")
    if not seconds:
        pytest.skip("a soak takes as long as --soak says, in seconds: --soak 1800")
    run, stop, draw = stage("hosfl", names=NAMES), tmp_path / "stop", random.Random(0)
    server = run.server(stop=str(stop), constant_rate=True, settings={**SETTINGS, "max_rounds": 1_000_000}).start()
    actors = [server, *(client.start() for client in run.clients(save_every=3))]
    until, kills, stops = time.monotonic() + seconds, 0, 0
    while time.monotonic() < until:
        time.sleep(draw.uniform(0.5, 4.0))
        actor = draw.choice([server, *actors])  # the server twice as often as a client
        if draw.random() < 0.1:
            actor.kill(signal.SIGSTOP)
            time.sleep(draw.uniform(0.1, 2.0))
            actor.kill(signal.SIGCONT)
            stops += 1
            continue
        actor.kill()
        assert actor.wait(10) == -signal.SIGKILL, actor.said
        time.sleep(draw.uniform(0.0, 1.0))
        actor.start()
        kills += 1
    stop.touch()
    for actor in actors:
        assert actor.wait(120) == 0, actor.said[-3000:]
    rounds = ReplayLog.read(run.run / "updates.log").rounds
    print(f"soak: {kills} kills and {stops} stops in {seconds:g} s, {rounds} rounds")
    algorithm, folder = CASES["hosfl"].algorithm(), str(tmp_path / "alone")
    algorithm.make_scheduler = None  # a rate that is halved every round would soon be none
    trainer = Orchestrator(
        algorithm, max_rounds=rounds, simulation="per_client", default_root_dir=folder,
        enable_progress_bar=False, enable_checkpointing=False, **SETTINGS, **CASES["hosfl"].settings,
    )  # fmt: skip
    model = model_of(str(tiny_folder))
    trainer.fit(model, RandomTokens(lengths(len(NAMES))))
    here = {name: torch.tensor(values) for name, values in run.left()["state"].items()}
    assert all(torch.equal(tensor, here[name]) for name, tensor in model.trained_state().items())
    assert run.left()["log"] == [*ReplayLog.read(Path(trainer.log_dir) / "updates.log").frames()]
