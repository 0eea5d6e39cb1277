"""A server and its clients as processes of their own.

    python -m tests.remote.actors server SPEC
    python -m tests.remote.actors client SPEC

SPEC is a JSON file: what is run, and where one of them ends itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hosfl_client.wire import envelope
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.wire import Message
from tests.fleet.pipe_client import LENGTHS, model_of
from tests.random_tokens import RandomTokens


def lengths(clients: int) -> list[list[int]]:
    """Of the examples of so many clients; of three those of `LENGTHS`."""
    return [LENGTHS[k % len(LENGTHS)] for k in range(clients)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def once(flag: str, kill: Callable[[], None] = die) -> Callable[[], None]:
    """Do it the first time that any process comes here."""

    def first() -> None:
        try:
            Path(flag).touch(exist_ok=False)
        except FileExistsError:
            return
        kill()

    return first


def client(spec: dict[str, Any]) -> None:
    from hosfl_client.connection import Backoff
    from hosfl_lightning.join import join

    if version := spec.get("protocol"):
        envelope.PROTOCOL = version
    if at := spec.get("die"):
        end_at(at["round"], at["kind"], at["when"], once(at["flag"]))
    if slow := spec.get("slow"):
        handle = Endpoint.handle

        def slowly(self: Endpoint, requests: list[Message]) -> list[Message]:
            if requests[0].kind == slow["kind"]:
                request: Any = requests[0]
                print(f"computing {request.kind} {request.round} {getattr(request, 'step', 0)}", flush=True)
                time.sleep(slow["seconds"])
            return handle(self, requests)

        Endpoint.handle = slowly  # type: ignore[method-assign,assignment]

    def model(part: str) -> Any:
        return model_of(spec["pretrained"], part=part, **spec.get("recipe", {}))

    said = join(
        spec["server"], model, RandomTokens(lengths(spec["clients"])), spec.get("certs"), name=spec["name"],
        insecure="certs" not in spec, state=spec["state"], save_every=spec.get("save_every", 1),
        backoff=Backoff(0.05, 0.3, spec.get("give_up", 60.0)), notify=lambda text: print(text, flush=True),
    )  # fmt: skip
    print(f"ended: {said}", flush=True)


def end_at(round: int, kind: str, when: str, kill: Callable[[], None]) -> None:
    """Before or after the answer to a message of a round."""
    handle = Endpoint.handle

    def watched(self: Endpoint, requests: list[Message]) -> list[Message]:
        mine = requests[0].round == round and requests[0].kind == kind
        if mine and when == "before":
            kill()
        answers = handle(self, requests)
        if mine and when == "after":
            kill()
        return answers

    Endpoint.handle = watched  # type: ignore[method-assign,assignment]


def rank(spec: dict[str, Any]) -> None:
    """One of two processes that share the clients of each round, in a simulation."""
    from hosfl_lightning import Orchestrator
    from tests.fleet.test_pipe import CASES

    place = {"NODE_RANK": spec["rank"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": spec["port"]}
    os.environ |= {**place, "OMP_NUM_THREADS": "1"}
    case = CASES[spec["case"]]
    trainer = Orchestrator(
        case.algorithm(), max_rounds=3, clients_per_round=2, val_check_interval=2, enable_progress_bar=False,
        num_nodes=2, default_root_dir=spec["folder"], **case.settings,
    )  # fmt: skip
    trainer.fit(model_of(spec["pretrained"], **case.recipe), RandomTokens(LENGTHS))


def server(spec: dict[str, Any]) -> None:
    from hosfl_client.limits import Limits
    from hosfl_lightning import Orchestrator, orchestrator
    from hosfl_lightning.privacy import Privacy
    from hosfl_lightning.server import CatchUp
    from tests.fleet.test_pipe import CASES
    from tests.remote.deaths import DieAt, StopAt

    if limits := spec.get("limits"):
        orchestrator.Limits = lambda frame_bytes, **given: Limits(frame_bytes, **(given | limits))  # type: ignore[assignment,misc]
    case = CASES[spec["case"]]
    callbacks: list[Any] = [StopAt(spec["stop"])] if "stop" in spec else []
    callbacks += [DieAt(at["round"], at["stage"], once(at["flag"])) for at in spec.get("deaths", [])]
    settings: dict[str, Any] = {
        "max_rounds": 3, "clients_per_round": 2, "val_check_interval": 2, "enable_progress_bar": False,
    }  # fmt: skip
    if "privacy" in spec:
        settings["privacy"] = Privacy(**spec["privacy"])
    if "policy" in spec:
        settings["catch_up"] = CatchUp(spec["policy"])
    algorithm = case.algorithm()
    if spec.get("constant_rate"):
        algorithm.make_scheduler = None
    trainer = Orchestrator(
        algorithm, **(settings | case.settings | spec.get("settings", {})), callbacks=callbacks,
        simulation="per_client", default_root_dir=spec["folder"],
    )  # fmt: skip
    model, data = model_of(spec["pretrained"], **case.recipe), RandomTokens(spec.get("lengths", LENGTHS))
    trainer.serve(
        model, data, spec["listen"], spec.get("certs"), spec["clients"], spec["folder"],
        insecure="certs" not in spec, **spec.get("serve", {}),
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"client": client, "server": server}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
