"""Clients in processes of their own, at the end of a line: the bits of `per_client` in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fleet.test_pipe import CASES


@pytest.mark.parametrize("case", CASES)
def test_remote_clients_give_the_bits_of_clients_in_the_process(case: str, stage: Any, undisturbed: Any) -> None:
    run = stage(case)
    server, clients = run.server().start(), [client.start() for client in run.clients()]
    for actor in (server, *clients):
        assert actor.wait() == 0, actor.said
    here, there = undisturbed(case), run.left()
    for part in here:
        assert here[part] == there[part], part
