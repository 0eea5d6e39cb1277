"""Steps 2 to 4 of a round, group after group: z, λ and graphs of one are gone before the next one runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hosfl_lightning.server.server import Server
from hosfl_lightning.server.tally import Tally
from hosfl_lightning.wire import Message, Multiplier, SmashedData, UnlabelledData


class Descent:
    """z up and the server's gradient, of each group in turn; both halves stay where they are.

    Args:
        server: Whose round it is.
        requests: What begins it, by client, ascending.

    Attributes:
        tally: What the groups have left, of all clients once it is over.
    """

    def __init__(self, server: Server, requests: Mapping[int, Message]) -> None:
        self.server, self.tally = server, Tally(awaited=len(requests))
        self.groups = server.groups(requests)

    def __call__(self, answer: Callable[[dict[int, Multiplier]], list[Any]]) -> list[Any]:
        """What ``answer`` makes of λ, by client, of all groups.

        Raises:
            TooFewClientsError: Too few clients have a loss term.
        """
        server, tally, answers = self.server, self.tally, list[Any]()
        for requests in self.groups:
            tally.awaited -= len(requests)
            inbox = server.admit(server.fleet.ask(requests, SmashedData, UnlabelledData), tally)
            _, multipliers = server.backward(inbox, tally)
            del inbox
            answers += answer(multipliers)
            del multipliers
        if len(self.groups) > 1:  # then this is the only process
            tally.finish([*server.module.server_parameters.values()])
        return answers
