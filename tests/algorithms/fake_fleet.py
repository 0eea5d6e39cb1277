"""A fleet without a client, and a method's server beside it: what a client would answer is scripted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from typing_extensions import override

from hosfl_lightning.aggregation import apply_update
from hosfl_lightning.algorithms import Algorithm
from hosfl_lightning.algorithms.shared_scalars import SharedScalars
from hosfl_lightning.fleet import Channel, Fleet, Processes
from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.server import Call, Outcome, Replica, Server
from hosfl_lightning.server.configured import configured
from hosfl_lightning.wire import Codecs, Message, RoundEnd, Update
from tests.algorithms.two_layers import TwoLayers
from tests.small_run import plain

#: Of a run.
CLIENTS = 6
Script = Callable[[Any], Message | None]
"""From what a client is sent to what it answers; None: it does not."""


class FakeFleet(Fleet):
    """What the server sends is kept; what the clients answer is a function of it.

    Args:
        script: The answers.
        replica: The server's, which moves with the clients.
        events: Takes ``ask <kind>`` and ``tell <kind>``, as they happen.

    Attributes:
        asked: Every exchange: its requests by client.
        told: What was sent to everybody, and who that is.
    """

    def __init__(self, script: Script, replica: Replica, events: list[str]) -> None:
        super().__init__(Channel(serialize=True), Processes())
        self.script, self.replica, self.events = script, replica, events
        self.asked: list[dict[int, Any]] = []
        self.told: list[tuple[Any, list[int]]] = []

    @override
    def ask(self, requests: Mapping[int, Message], *expected: type[Message]) -> list[Any]:
        self.asked.append(dict(requests))
        self.events += sorted({f"ask {request.kind}" for request in requests.values()})
        taken: list[Message] = []
        for client in sorted(requests):
            answer = self.script(self.channel.down(requests[client]))
            if answer is None:
                self.refuse(client, "it does not answer")
            else:
                taken += self.take(requests[client], answer, expected)
        return taken

    @override
    def tell(self, message: Update | RoundEnd, clients: Sequence[int]) -> None:
        self.told.append((self.channel.down(message, receivers=len(clients)), list(clients)))
        self.events.append(f"tell {message.kind}")
        if isinstance(message, Update):
            apply_update(message, self.replica.optimizer)

    @override
    def abandon(self) -> None:
        self.events.append("abandon")


class LonelyServer:
    """A method's server of a `TwoLayers` model, whose clients are scripts.

    Args:
        algorithm: The method.
        script: What its clients answer.
        model: The model; None: as it starts, with an optimizer that has moments.
        settings: Of the `Server`.

    Attributes:
        events: What happens, in order: what is asked and told, ``record``, ``step``.
        recorded: The updates on record, and the `state` when they were put there.
    """

    def __init__(self, algorithm: Algorithm, script: Script, model: TwoLayers | None = None, **settings: Any) -> None:
        self.algorithm, self.model = algorithm, model or TwoLayers(adamw)
        self.events: list[str] = []
        self.recorded: list[tuple[Update, Any]] = []
        trained = algorithm.parameters(self.model)
        probed = algorithm.client_settings_of_probes() if isinstance(algorithm, SharedScalars) else {}
        rule = ZerothOrder(trained.items(), algorithm.client_optimizer, **probed)
        self.replica = Replica(trained, rule)
        self.fleet = FakeFleet(script, self.replica, self.events)
        fabric = Fabric(accelerator="cpu", devices=1)
        optimizer, scheduler = configured(self.model)
        optimizer.register_step_post_hook(lambda *_: self.events.append("step"))
        sizes = [p.numel() for p in trained.values()]
        given: dict[str, Any] = {"joint": algorithm.joint}
        terms = algorithm.terms(self.model, 0, Codecs(), CLIENTS)
        self.server = Server(
            self.model, fabric, fabric.setup_optimizers(optimizer), scheduler, fleet=self.fleet, replica=self.replica,
            basis=lambda round: algorithm.basis(0, round, sizes), publish=self.publish, fire=lambda *_, **__: None,
            terms=terms, **given | settings,
        )  # fmt: skip
        algorithm.setup(self.server)

    def publish(self, update: Update) -> Update:
        """It is on record."""
        self.events.append("record")
        self.recorded.append((update, self.state()))
        return update

    def round(self, call: Call) -> Outcome:
        """The server's part of one attempt."""
        self.server.call = call
        self.fleet.assemble(call.clients)
        return self.algorithm.server_round(self.server, self.fleet, call)

    def state(self) -> Any:
        """The bits of both halves and of what their rules keep."""
        return [self.client_state(), self.server_state()]

    def client_state(self) -> Any:
        """Of the replica."""
        return plain([self.replica.vector(), self.replica.optimizer.state_dict()])

    def server_state(self) -> Any:
        """Of the server's half."""
        return plain(list(self.server.state()))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)
