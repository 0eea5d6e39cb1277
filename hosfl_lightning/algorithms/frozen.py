"""The lower control: the client does nothing."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Descent, Outcome, Server


class Frozen(SplitRound):
    """The same rounds with a client that does not move: what the server reaches alone.

    With ``model.init_args.labels: client`` a head that is trained is trained here too, at the client: it is no part of
    the half that is frozen.
    """

    grouped = True
    records = sums = False
    client_trains = False

    @override
    def client_settings(self) -> dict[str, Any]:
        return {"kind": "frozen"}

    @override
    def setup(self, server: Server) -> None:
        """No rule moves a client, so its schedule has nothing to do."""
        if server.basis(0) is None:
            self.client_schedule = None
        else:
            super().setup(server)

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """Steps 2 and 3: nobody waits for λ, unless for a head."""
        if server.basis(call.round) is not None:
            return super().server_round(server, fleet, call)
        descent = Descent(server, self.requests(server, call))
        descent(lambda multipliers: [])
        server.step()
        return Outcome(descent.tally.loss, descent.tally.num_examples)
