"""The lower control: the client does nothing."""

from __future__ import annotations

from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.clients import Client, FrozenClient
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.servers import SplitModule


class Frozen(Algorithm):
    """The same rounds with a client that does not move: what the server reaches alone."""

    def make_client(self, module: SplitModule, seed: int) -> Client:
        """A `FrozenClient`."""
        return FrozenClient(module.client_half, ZerothOrder(module.client_parameters.items(), self.client_optimizer))

    def basis(self, round: int) -> None:
        """No answer."""
        return None
