"""The lower control: the client does nothing."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import SmashedData


class Frozen(SplitRound):
    """The same rounds with a client that does not move: what the server reaches alone."""

    records = sums = False
    client_trains = False

    @override
    def client_settings(self) -> dict[str, Any]:
        return {"kind": "frozen"}

    @override
    def setup(self, server: Server) -> None:
        """No rule moves a client, so its schedule has nothing to do."""
        self.client_schedule = None

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """Steps 2 and 3: nobody waits for λ."""
        inbox = server.admit(fleet.ask(call.to_each(), SmashedData))
        loss, _ = server.backward(inbox)
        server.step()
        return Outcome(loss, inbox.num_examples)
