"""Who is there, who is asked, and what clients hold out."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from hosfl_lightning.server.replay_log import ReplayLog
from tests.remote.conftest import Actor, Stage
from tests.remote.test_kills import fallen, finished, holds_what_the_server_holds


def rows(run: Stage) -> list[dict[str, str]]:
    return [*csv.DictReader((run.run / "metrics.csv").read_text().splitlines())]


def test_of_more_clients_than_are_needed_the_first_count(stage: Any) -> None:
    run = stage()
    serve = {"quorum": 3, "oversample": 1}
    server = run.server(serve=serve).start()
    slow = run.client("cid", slow={"kind": "step_request", "seconds": 0.4}).start()
    others = [run.client(name).start() for name in ("ann", "bob")]
    finished(server, slow, *others)
    assert int(float(rows(run)[-1]["fleet/spared"])) == 3
    assert "round 0 goes on without cid: others were faster" in server.said
    assert "refused" not in server.said
    holds_what_the_server_holds(run, run.names)


def test_other_clients_than_the_first_time_make_another_history(stage: Any) -> None:
    """A restarted server cannot repeat a round without those who were in it: what is on record is void."""
    run = stage()
    deaths = [{"round": 1, "stage": "end", "flag": str(run.folder / "died")}]
    server = run.server(serve={"quorum": 2, "deadline": 2.0}, deaths=deaths).start()
    ann, bob = (run.client(name).start() for name in ("ann", "bob"))
    fallen([server])
    ann.kill()
    ann.wait()
    cid = run.client("cid").start()
    server.start()
    server.wait_to_say("round 0 begins", times=2)  # with others than before
    ann.start()
    finished(server, ann, bob, cid)
    log = ReplayLog.read(run.run / "updates.log")
    assert [start["from_round"] for start in log.starts] == [0, 0]
    assert len({start["incarnation"] for start in log.starts}) == 2
    holds_what_the_server_holds(run, ["bob", "cid"])  # ann may come after the last round


@pytest.mark.parametrize("where", ["clients", "both"])
def test_clients_validate_on_what_they_hold_out(where: str, stage: Any, undisturbed: Any) -> None:
    """Here all of them hold out what the server has, and more of the same changes no mean."""
    run = stage("hosfl central")  # whose z is not rounded
    server = run.server(serve={"quorum": 3, "validate": where}).start()
    clients = [client.start() for client in run.clients()]
    finished(server, *clients)
    there, key = undisturbed(run.case), "val/" if where == "clients" else "val_clients/"
    for here, row in zip(rows(run), there["metrics"]):
        for name in ("loss", "token_accuracy"):
            expected = row[f"val/{name}"]
            assert bool(here[f"{key}{name}"]) == bool(expected)
            if expected:
                assert float(here[f"{key}{name}"]) == pytest.approx(float(expected), rel=1e-5)
    assert run.left()["log"] == there["log"]
    assert json.loads((run.run / "summary.json").read_text())["val_loss_last"] > 0


def test_a_method_whose_clients_hold_no_weights_between_rounds_cannot_validate_there(stage: Any) -> None:
    server: Actor = stage("fedavg").server(serve={"validate": "clients"}).start()
    assert server.wait() == 1
    assert "the clients of FedAvg do not hold the run's weights" in server.said


@pytest.mark.parametrize(("quorum", "words"), [(1, "trainer.min_clients is 2"), (4, "lists 3")])
def test_a_quorum_that_no_round_can_go_on_with_is_refused(quorum: int, words: str, stage: Any) -> None:
    """Too small a one would try a round without a pause until the run ends, too large a one would wait for ever."""
    run = stage()
    server = run.server(serve={"quorum": quorum}, settings={"min_clients": 2}).start()
    run.client("ann").start()
    assert server.wait(30) == 1
    assert f"--quorum is {quorum}" in server.said
    assert words in server.said
