"""A client of a run elsewhere, with tensors of torch."""

from __future__ import annotations

from collections.abc import Callable

from hosfl_client import joined
from hosfl_client.wire import Terms
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.clients.own_state import OwnState
from hosfl_lightning.wire.encoding import FRAMES


class Joined(joined.Joined):
    """See `hosfl_client.joined.Joined`; it runs every `Endpoint` that is known here.

    Args:
        name: As in the client's certificate.
        package: Version of the software.
        build: Makes the endpoint.
        state: What is kept on the disk; None: nothing.
        save_every: Updates from one write of the shared state to the next.
        notify: Takes what people should hear of.
    """

    def __init__(
        self,
        name: str,
        package: str,
        build: Callable[[Terms], Endpoint],
        state: OwnState | None = None,
        save_every: int = 10,
        notify: Callable[[str], None] = print,
    ) -> None:
        super().__init__(name, package, build, sorted(Endpoint.known), FRAMES, state, save_every, notify)
