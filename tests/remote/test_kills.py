"""Whoever is killed, and whenever: started again it goes on, to the bits of a run that was never disturbed."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hosfl_lightning.wire import decode
from tests.remote.actors import lengths
from tests.remote.conftest import Actor, Stage
from tests.remote.deaths import STAGES


def finished(*actors: Actor) -> None:
    for actor in actors:
        assert actor.wait() == 0, actor.said


def same(run: Stage, undisturbed: Any) -> None:
    here, there = undisturbed(run.case), run.left()
    for part in here:
        assert here[part] == there[part], part


def fallen(actors: list[Actor], seconds: float = 60.0) -> Actor:
    """The one that has killed itself."""
    until = time.monotonic() + seconds
    while not (dead := [actor for actor in actors if actor.status is not None]):
        assert time.monotonic() < until, "nobody has died"
        time.sleep(0.02)
    assert dead[0].status == -signal.SIGKILL, dead[0].said
    return dead[0]


def holds_what_the_server_holds(run: Stage, names: list[str]) -> None:
    """The state on the disk of each client, against the server's last checkpoint."""
    server = {n: torch.tensor(v) for n, v in run.left()["state"].items() if n.startswith("client_half.")}
    for name in names:
        held = safetensors.torch.load_file(run.folder / f"state_{name}" / "shared.safetensors")
        theta = [held[f"{i}.theta"] for i in range(len(server))]
        assert all(torch.equal(a, b) for a, b in zip(theta, server.values())), name


@pytest.mark.parametrize(
    ("case", "kind", "when"),
    [
        ("hosfl", "step_request", "before"),  # before z
        ("hosfl", "multiplier", "before"),  # between λ and the scalars
        ("hosfl", "multiplier", "after"),  # which are computed, and not sent
        ("hosfl", "update", "before"),  # after the scalars
        ("hosfl", "update", "after"),
        ("fedavg", "weights", "before"),
        ("fedavg", "weights", "after"),  # what it alone knows is lost with it
        ("fedavg", "round_end", "before"),  # what it alone knows is on its disk, and counts
        ("splitfed v2", "multiplier", "before"),  # in the middle of its local steps
    ],
)
def test_a_client_is_killed(case: str, kind: str, when: str, stage: Any, undisturbed: Any) -> None:
    run = stage(case)
    die = {"round": 1, "kind": kind, "when": when, "flag": str(run.folder / "died")}
    server, clients = run.server().start(), [client.start() for client in run.clients(die=die)]
    fallen(clients).start()
    finished(server, *clients)
    same(run, undisturbed)


def test_a_client_that_is_killed_under_its_masks_has_lost_its_keys(stage: Any) -> None:
    """The round's sum is of the others, and it is in the next; whoever it was that fell."""
    run = stage("secure sum", names=["ann", "bob", "cid", "dan"])
    die = {"round": 1, "kind": "secure_shares", "when": "before", "flag": str(run.folder / "died")}
    server = run.server(settings={"clients_per_round": 4}, lengths=lengths(4)).start()
    clients = [client.start() for client in run.clients(die=die)]
    dead = clients.index(fallen(clients).start())
    finished(server, *clients)
    left = [k for k in range(4) if k != dead]
    heard = [decode(frame, "update").participants for frame in run.left()["log"]]  # type: ignore[union-attr]
    assert heard == [[0, 1, 2, 3], left, [0, 1, 2, 3]]
    assert f"client {dead} is refused: it came back and answers with other bits than before" in server.said
    holds_what_the_server_holds(run, run.names)


@pytest.mark.parametrize(
    ("case", "round", "at"),
    [
        *(("hosfl", 1, at) for at in STAGES),
        ("fedavg", 2, "begin"),  # right after a checkpoint, in which clients have states of their own
        ("fedavg", 1, "end"),
        ("splitfed v2", 1, "before_step"),
    ],
)
def test_the_server_is_killed(case: str, round: int, at: str, stage: Any, undisturbed: Any) -> None:
    run = stage(case)
    deaths = [{"round": round, "stage": at, "flag": str(run.folder / "died")}]
    server, clients = run.server(deaths=deaths).start(), [client.start() for client in run.clients()]
    fallen([server]).start()
    finished(server, *clients)
    same(run, undisturbed)


def test_the_last_record_of_the_log_is_torn(stage: Any, undisturbed: Any) -> None:
    run = stage()
    deaths = [{"round": 1, "stage": "end", "flag": str(run.folder / "died")}]
    server, clients = run.server(deaths=deaths).start(), [client.start() for client in run.clients()]
    fallen([server])
    log = run.run / "updates.log"
    log.write_bytes(log.read_bytes()[:-40])
    server.start()
    finished(server, *clients)
    same(run, undisturbed)


@pytest.mark.parametrize("how", ["older", "foreign", "newer", "flipped", "torn", "gone"])
def test_a_client_comes_back_with_another_state(how: str, stage: Any, undisturbed: Any, tmp_path: Path) -> None:
    run = stage()
    deaths = [{"round": 2, "stage": "begin", "flag": str(run.folder / "died")}]
    server = run.server(deaths=deaths).start()
    ann, bob, cid = (client.start() for client in run.clients())
    held = Path(bob.spec["state"]) / "shared.safetensors"
    fallen([server])
    bob.kill()
    assert bob.wait() == -signal.SIGKILL
    change(how, held)
    server.start()
    bob.start()
    finished(server, ann, bob, cid)
    same(run, undisturbed)
    holds_what_the_server_holds(run, run.names)


def change(how: str, held: Path) -> None:
    data = held.read_bytes()
    if how == "gone":
        held.unlink()
    elif how == "torn":
        held.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        held.write_bytes(data[:-3] + bytes([data[-3] ^ 64]) + data[-2:])
    else:
        note = data.find(b'\\"version\\": ') + len(b'\\"version\\": ')
        assert data[note : note + 1] in b"12", data[:400]
        if how == "foreign":
            place = data.find(b'\\"run_id\\": \\"') + len(b'\\"run_id\\": \\"')
            held.write_bytes(data[:place] + b"00" + data[place + 2 :])
        else:
            held.write_bytes(data[:note] + (b"0" if how == "older" else b"9") + data[note + 1 :])


def test_a_client_is_stopped_past_the_deadline(stage: Any) -> None:
    """The others go on without it, and it comes back."""
    run = stage()
    serve = {"quorum": 2, "deadline": 1.0, "keepalive": 1.0}
    server = run.server(serve=serve, settings={"max_rounds": 40, "clients_per_round": 3}).start()
    ann, bob, cid = (client.start() for client in run.clients())
    server.wait_to_say("is in", times=3)
    bob.kill(signal.SIGSTOP)
    server.wait_to_say("no answer within 1 s (it is connected)", times=2)
    for one in (ann, cid):  # until it is back, too few are there
        one.kill()
    server.wait_to_say("bob is gone")
    bob.kill(signal.SIGCONT)
    server.wait_to_say("bob is in", times=2)
    ann.start()
    cid.start()
    finished(server, ann, bob, cid)
    holds_what_the_server_holds(run, ["ann", "cid", "bob"])


def test_a_client_is_back_after_some_rounds(stage: Any) -> None:
    """It replays what it missed; meanwhile the others lose their quorum, and regain it."""
    run = stage()
    serve = {"quorum": 2, "deadline": 1.0}
    rounds = {"max_rounds": 60, "val_check_interval": 60}  # some are left when the last one is back
    server = run.server(serve=serve, settings=rounds, policy="replay").start()
    ann, bob = (run.client(name).start() for name in ("ann", "bob"))
    cid = run.client("cid", die={"round": 3, "kind": "update", "when": "before", "flag": str(run.folder / "died")})
    server.wait_to_say("round 0 begins")
    bob.kill()
    cid.start()
    fallen([cid])
    bob.wait()
    server.wait_to_say("waits: 1 of 2")
    bob.start()
    server.wait_to_say("bob replays the updates from round")
    cid.start()
    finished(server, ann, bob, cid)
    holds_what_the_server_holds(run, run.names)


def test_all_clients_are_gone_and_back(stage: Any, undisturbed: Any) -> None:
    run = stage()
    clients = [
        run.client(name, die={"round": 1, "kind": "update", "when": "after", "flag": str(run.folder / f"died_{name}")})
        for name in run.names
    ]
    server = run.server().start()
    for client in clients:
        client.start()
    for client in clients:
        assert client.wait() == -signal.SIGKILL
    server.wait_to_say("waits: 0 of 3")
    for client in clients:
        client.start()
    finished(server, *clients)
    same(run, undisturbed)


def test_of_two_connections_with_one_name_the_newer_stays(stage: Any, undisturbed: Any) -> None:
    run = stage()
    server = run.server().start()
    old = run.client("ann").start()
    server.wait_to_say("ann is in")
    new = run.client("ann", state=str(run.folder / "other_state"))
    new.name = "ann_again"
    new.start()
    assert old.wait() == 1
    assert "another connection of ann has taken its place" in old.said
    others = [run.client(name).start() for name in ("bob", "cid")]
    finished(server, new, *others)
    assert "ann has connected anew" in server.said
    same(run, undisturbed)


def test_a_client_without_a_server_gives_up(stage: Any) -> None:
    client = stage().client("ann", give_up=1.0).start()
    assert client.wait(20) == 1
    assert "was not to be had for 1 s" in client.said
    assert client.said.count("trying again") < 6


def test_the_state_of_the_disk_is_gone_for_a_client_with_its_own_moments(stage: Any) -> None:
    """Nobody else knows them: it says so and goes on."""
    run = stage("fedavg")
    deaths = [{"round": 2, "stage": "begin", "flag": str(run.folder / "died")}]
    server, clients = run.server(deaths=deaths).start(), [client.start() for client in run.clients()]
    fallen([server])
    for client in clients:
        client.kill()
        client.wait()
        shutil.rmtree(client.spec["state"])
        client.start()
    server.start()
    finished(server, *clients)
    assert any("its moments begin anew" in client.said for client in clients)
