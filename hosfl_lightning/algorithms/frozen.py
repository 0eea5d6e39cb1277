"""The lower control: the client does nothing."""

from __future__ import annotations

from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.clients import FrozenClient, SplitClient
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.servers import SplitModule


class Frozen(SplitRound):
    """The same rounds with a client that does not move: what the server reaches alone."""

    records = False
    client_trains = False

    def make_client(self, module: SplitModule, seed: int) -> SplitClient:
        """A `FrozenClient`."""
        group = {"params": [*module.client_parameters.items()]}  # which may be empty
        return FrozenClient(module.client_half, ZerothOrder([group], self.client_optimizer))
