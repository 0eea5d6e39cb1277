"""What forwards have kept is given back when none has come for a while, and not while one runs."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hosfl_client import half as of_half
from hosfl_client.half import OnnxHalf
from hosfl_client.idle import Idle


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def test_it_is_done_once_when_nothing_else_is() -> None:
    done: list[float] = []
    idle = Idle(lambda: done.append(time.monotonic()), 0.05)
    assert within(5, lambda: len(done) == 1)
    with idle:
        pass
    with idle:
        time.sleep(0.15)  # longer than the time: a use is no pause
        assert len(done) == 1
        ended = time.monotonic()
    assert within(5, lambda: len(done) == 2) and done[1] >= ended + 0.05
    time.sleep(0.15)
    assert len(done) == 2
    with idle:
        pass
    idle.stop()
    time.sleep(0.15)
    assert len(done) == 2


def test_it_is_done_once_after_many_uses() -> None:
    done: list[int] = []
    idle = Idle(lambda: done.append(1), 0.1)
    for _ in range(4):  # the later ones while it already waits for the time to pass
        with idle:
            time.sleep(0.01)
    assert within(5, lambda: len(done) == 1)
    time.sleep(0.3)
    idle.stop()
    assert done == [1]


def test_what_is_done_may_end_it() -> None:
    ended: list[bool] = []

    def act() -> None:  # as when the last one that holds a half lets go of it meanwhile
        idle.stop()
        ended.append(True)

    idle = Idle(act, 0.01)
    assert within(5, lambda: bool(ended))
    idle.stop()


def test_a_half_gives_back_what_forwards_keep(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, released = exported(), list[int]()
    monkeypatch.setattr(of_half, "IDLE", 0.05)
    monkeypatch.setattr(OnnxHalf, "release", lambda self: released.append(1))
    before = threading.active_count()
    half = OnnxHalf(path, 1)
    assert within(5, lambda: len(released) == 1)  # what loading took
    batch = {"input_ids": np.ones((2, 5), np.int64), "attention_mask": np.ones((2, 5), np.int64)}
    half.forward(batch)
    assert within(5, lambda: len(released) == 2)
    gone = weakref.ref(half)
    del half
    assert gone() is None and within(5, lambda: threading.active_count() == before)
