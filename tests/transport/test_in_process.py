from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hosfl_lightning.transport import InProcess, Sent
from hosfl_lightning.wire import Weights, encode


class TwoProcesses(InProcess):
    """Of which the other one says what it was told to say."""

    def __init__(self, other: object) -> None:
        super().__init__(serialize=False)
        self.other = other

    def share(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_one_process_hears_itself() -> None:
    transport = InProcess(serialize=False)
    transport.ledger += [Sent("update", "down", 580, 3), Sent("weights", "up", 300, 1, 0)]
    assert transport.share([1, None]) == [[1, None]]
    assert transport.count(4) == 4
    assert transport.entries() == [Sent("update", "down", 580, 3), Sent("weights", "up", 300, 1, 0)]
    assert transport.own([4, 2, 9]) == [4, 2, 9]


@pytest.mark.parametrize("serialize", [True, False])
def test_the_ledger_names_the_client_and_the_bytes_of_the_frame(serialize: bool) -> None:
    transport = InProcess(serialize)
    to_all, of_one = Weights(2, None, {"w": torch.ones(3)}), Weights(2, 0, {"w": torch.ones(3)}, 5)
    assert transport.down(to_all, receivers=4).client is None
    assert transport.up(of_one).client == 0
    assert transport.ledger == [
        Sent("weights", "down", len(encode(to_all)), 4),
        Sent("weights", "up", len(encode(of_one)), 1, 0),
    ]


def test_what_several_processes_say_is_put_together() -> None:
    assert TwoProcesses(3).count(4) == 7
    transport = TwoProcesses([["multiplier", "down", 72, 1, 4]])
    transport.ledger.append(Sent("update", "down", 580, 3))
    assert transport.entries() == [Sent("update", "down", 580, 3), Sent("multiplier", "down", 72, 1, 4)]


def test_rows_come_in_client_order_and_a_nan_does_not_disturb_it() -> None:
    rows = TwoProcesses([[1, math.nan], [5, 0.0]]).in_client_order([[0, math.nan], [2, 1.0]])
    assert [client for client, _ in rows] == [0, 1, 2, 5]
