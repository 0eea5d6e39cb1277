"""Memory is given back when nothing has been asked for a while, once, and never during work."""

from __future__ import annotations

import threading
import time

from hosfl_client.rest import Rest


def test_it_acts_once_after_work_and_never_beside_it() -> None:
    acted, calls = threading.Event(), list[float]()

    def act() -> None:
        calls.append(time.monotonic())
        acted.set()

    rest = Rest(act, 0.05)
    time.sleep(0.1)
    assert calls == []  # nothing was done yet, so nothing was kept
    for _ in range(2):
        acted.clear()
        with rest.working():
            time.sleep(0.15)
            assert not acted.is_set()
        done = time.monotonic()
        assert acted.wait(5)
        assert calls[-1] >= done + 0.04
        time.sleep(0.1)
    assert len(calls) == 2
