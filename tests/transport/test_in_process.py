from __future__ import annotations

import math
from typing import Any

from hosfl_lightning.transport import InProcess, Sent


class TwoProcesses(InProcess):
    """Of which the other one says what it was told to say."""

    def __init__(self, other: object) -> None:
        super().__init__(serialize=False)
        self.other = other

    def share(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_one_process_hears_itself() -> None:
    transport = InProcess(serialize=False)
    transport.ledger.append(Sent("update", "down", 580, 3))
    assert transport.share([1, None]) == [[1, None]]
    assert transport.count(4) == 4
    assert transport.entries() == [Sent("update", "down", 580, 3)]
    assert transport.own([4, 2, 9]) == [4, 2, 9]


def test_what_several_processes_say_is_put_together() -> None:
    assert TwoProcesses(3).count(4) == 7
    transport = TwoProcesses([["multiplier", "down", 72, 1]])
    transport.ledger.append(Sent("update", "down", 580, 3))
    assert transport.entries() == [Sent("update", "down", 580, 3), Sent("multiplier", "down", 72, 1)]


def test_rows_come_in_client_order_and_a_nan_does_not_disturb_it() -> None:
    rows = TwoProcesses([[1, math.nan], [5, 0.0]]).in_client_order([[0, math.nan], [2, 1.0]])
    assert [client for client, _ in rows] == [0, 1, 2, 5]
