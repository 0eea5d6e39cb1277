"""One client's round before the first one, as the method's own conversation, after which everything is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import copy, deepcopy
from typing import Any

import torch
from typing_extensions import override

from hosfl_lightning.clients.cohort import Cohort
from hosfl_lightning.clients.endpoint import Endpoint
from hosfl_lightning.fleet import Channel, LocalFleet
from hosfl_lightning.server import Call, TooFewClientsError
from hosfl_lightning.wire import Message, RoundEnd, Update

Around = Callable[[Message], AbstractContextManager[None]]
"""Open while the client answers a message."""


class Rehearsal:
    """What a run is about to do with one client, to be watched.

    Args:
        trainer: Whose training is set up.

    Attributes:
        cohort: The client's first minibatch: of the first client of round 0 that has a loss term.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.algorithm, self.endpoint = trainer, trainer.algorithm, trainer.endpoint
        everybody = [*trainer.sample(0), *trainer.datamodule.holders]
        cohorts = (self.endpoint.data([client], 0) for client in everybody)
        self.cohort: Cohort = next((one for one in cohorts if sum(one.num_terms)), self.endpoint.data(everybody[:1], 0))
        self._batches: dict[Any, Cohort] = {}

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward."""
        return self.trainer.fabric.autocast()

    def round(self, around: Around | None = None, round: int = 0) -> None:
        """The conversation of a round with that client alone; nothing where it has no loss term.

        Args:
            around: Open while the client answers.
            round: The round.
        """
        if not sum(self.cohort.num_terms):
            return
        fleet = WatchedFleet(self.endpoint, around or (lambda message: nullcontext()))
        fleet.assemble(self.cohort.clients)
        server = copy(self.trainer.server)
        server.fleet, server.watchers, server.gradient_clip_val, server.min_clients = fleet, (), None, 1
        server.fire, server.publish = _nothing, _itself
        server.optimizer = Still(list(server.module.server_parameters.values()))
        server.call = Call(round, self.cohort.clients, self.cohort.clients)
        # One client makes no secure sum; in the open it computes the same.
        server.secure_threshold, hidden, self.endpoint.hidden = None, self.endpoint.hidden, None
        try:
            with suppress(TooFewClientsError):  # what a server cannot use, it refuses in a round, by name
                self.algorithm.server_round(server, fleet, server.call)
        finally:
            self.endpoint.hidden = hidden

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever happens inside, both halves, the client and the method end as they were."""
        endpoint, algorithm, module = self.endpoint, self.algorithm, self.trainer.lightning_module
        trained = [*module.trained_state().values(), *endpoint.trained.values()]
        bits = [tensor.detach().clone() for tensor in trained]
        held = deepcopy((endpoint.state_dict(), algorithm.state_dict()))
        data, checks, endpoint.data, endpoint.checks = endpoint.data, endpoint.checks, self._data(endpoint.data), False
        try:
            yield
        finally:
            endpoint.data, endpoint.checks = data, checks
            endpoint.forget()
            with torch.no_grad():
                for tensor, value in zip(trained, bits):
                    tensor.copy_(value)
            endpoint.load_state_dict(held[0])
            algorithm.load_state_dict(held[1])
            for parameter in module.server_half.parameters():
                parameter.grad = None
            torch.clear_autocast_cache()

    def _data(self, data: Callable[[list[int], int], Cohort]) -> Callable[[list[int], int], Cohort]:
        """Minibatches that are made once, so that nobody pays for them while somebody watches."""

        def known(clients: list[int], step: int) -> Cohort:
            place = (*clients, step)
            if place not in self._batches:
                self._batches[place] = data(clients, step)
            return self._batches[place]

        return known


class WatchedFleet(LocalFleet):
    """One client, whose messages are encoded and decoded, as between machines; of the server it holds nothing.

    Args:
        endpoint: The client.
        around: Open while it answers.
    """

    def __init__(self, endpoint: Endpoint, around: Around) -> None:
        super().__init__(endpoint, Channel(serialize=True), joint=False)
        self.around = around

    @override
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        heard = self.channel.down(message)
        with self.around(heard):
            self.endpoint.handle([heard])

    @override
    def _exchange(self, requests: list[Message], expected: Sequence[type[Message]]) -> list[Message]:
        heard = [self.channel.down(request) for request in requests]
        with self.around(heard[0]):
            answers = self.endpoint.handle(heard)
        return [taken for pair in zip(requests, answers) for taken in self.take(*pair, expected)]


class Still(torch.optim.SGD):
    """The server's optimizer in a rehearsal: it does not move."""

    @override
    def step(self, closure: Any = None) -> Any:
        """Nothing."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """No hook is fired."""


def _itself(update: Update) -> Update:
    """Nothing is put on record."""
    return update
