"""What the processes that share the clients of a round tell each other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hosfl_lightning.fleet import Processes
from hosfl_lightning.fleet.sums import LocalSums
from hosfl_lightning.wire import ProjectedGradients


class TwoProcesses(Processes):
    """Of which the other one says what it was told to say."""

    def __init__(self, other: object) -> None:
        self.other = other

    def share(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_one_process_hears_itself() -> None:
    alone = Processes()
    assert alone.is_first
    assert alone.share([1, None]) == [[1, None]]
    assert alone.say(b"frame") == b"frame"
    assert alone.count(4) == 4
    assert alone.own([4, 2, 9]) == [4, 2, 9]
    answers = [ProjectedGradients(0, k, {}, torch.ones(2), 1) for k in (2, 0)]
    assert alone.collect(answers) == answers
    assert type(alone.sums([nn.Parameter(torch.ones(2))])) is LocalSums
    alone.wait()


def test_what_several_processes_count_is_put_together() -> None:
    assert TwoProcesses(3).count(4) == 7


def test_rows_come_in_client_order_and_a_nan_does_not_disturb_it() -> None:
    rows = TwoProcesses([[1, math.nan], [5, 0.0]]).in_client_order([[0, math.nan], [2, 1.0]])
    assert [client for client, _ in rows] == [0, 1, 2, 5]
