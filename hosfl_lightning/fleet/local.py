"""Clients that live in the server's process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.fleet.channel import Channel
from hosfl_lightning.fleet.processes import Processes
from hosfl_lightning.wire import Message, RoundEnd, Update


class LocalFleet(Fleet):
    """One endpoint is all the clients of this process: those that are up to date are bit-identical.

    Their half is the server's replica, too, so that an update moves both at once.

    Args:
        endpoint: The clients.
        channel: Carries and counts the messages.
        joint: A round's clients run as one batch; else one after the other.
        processes: Which others have a part in the server's work; None: there is one.
    """

    def __init__(self, endpoint: Endpoint, channel: Channel, joint: bool, processes: Processes | None = None) -> None:
        super().__init__(channel, processes or Processes())
        self.endpoint, self.joint = endpoint, joint

    @override
    def ask(self, requests: Mapping[int, Message], *expected: type[Message]) -> list[Any]:
        asked = [client for client in self.own if client in requests]
        groups = [asked] if self.joint and asked else [[client] for client in asked]
        return [answer for group in groups for answer in self._exchange([requests[k] for k in group], expected)]

    @override
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        self.endpoint.handle([self.channel.down(message, receivers=len(clients))])

    @override
    def abandon(self) -> None:
        self.endpoint.forget()

    def _exchange(self, requests: list[Message], expected: Sequence[type[Message]]) -> list[Message]:
        answers = self.endpoint.handle([self.channel.down(request) for request in requests])
        pairs = zip(requests, answers, strict=True)
        return [taken for request, answer in pairs for taken in self.take(request, answer, expected)]
