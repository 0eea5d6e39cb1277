"""A split round whose clients keep a part of what they train for themselves, or all of it."""

from __future__ import annotations

from typing import Any, get_args

import torch
from typing_extensions import override

from hosfl_lightning.aggregation import MEAN
from hosfl_lightning.aggregation.weights import weights
from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.clients.head import of_head
from hosfl_lightning.clients.personal_endpoint import PersonalEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.models import SplitModule
from hosfl_lightning.optim import Dense
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.split.personal import PersonalPart, divide
from hosfl_lightning.wire import Acknowledgement, RoundEnd, SmashedData, StepRequest, UnlabelledData, Update


class PersonalRound(SplitRound):
    r"""``θ_k ← rule(θ_k, ĝ_k)`` of what is personal; the server's half, and the rest of θ_c, are as in `SplitRound`.

    All of θ_c personal: λ is answered by an `Acknowledgement`, and `RoundEnd` says who counts. The update log holds who
    that was in each round, with which weight and learning rate, and no coefficient.

    Args:
        personal: False: nothing is. True: all of θ_c. A word (``norm``, ``bias``, ``first_layer``, ``ia3``, ``lora``,
            ``side``): that part of θ_c, the rest being shared.

    Raises:
        ValueError: Another word, or an aggregation of nothing.
    """

    grouped = True

    def __init__(self, *args: Any, personal: bool | PersonalPart = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(personal, bool) and personal not in get_args(PersonalPart):
            raise ValueError(
                f"trainer.algorithm.init_args.personal={personal!r}: true, false, or one of "
                f"{', '.join(get_args(PersonalPart))}"
            )
        self.personal = personal
        if personal:
            self.endpoint, self.joint, self.sums = PersonalEndpoint, False, False
        if personal is True:
            if self.aggregation != MEAN:
                raise ValueError(
                    f"trainer.algorithm.init_args.aggregation={type(self.aggregation).__name__}: with personal: true "
                    "nothing is aggregated; leave it out"
                )
            self.records = self.codes_gradient = False
            self.tells = self.tells & {"multipliers"}

    @property
    def settings_of_personal(self) -> dict[str, Any]:
        """Of the settings, for clients and checkpoints; nothing where nothing is personal."""
        return {"personal": self.personal} if self.personal else {}

    @property
    @override
    def step_by_step(self) -> bool:
        """Its clients run one after the other, and do not depend on each other's steps."""
        return True

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), **self.settings_of_personal}

    @override
    def check(self, module: SplitModule) -> None:
        """A word must name a part of what is trained."""
        if self.personal and of_head(module):
            raise ValueError(
                "trainer.algorithm.init_args.personal: a head that is trained at the client is everybody's; leave it "
                "out, or set model.init_args.labels: server"
            )
        divide(module.client_half, module.client_parameters, self.personal)
        super().check(module)

    @override
    def requests(self, server: Server, call: Call) -> dict[int, StepRequest]:
        """With the rule of the round, which moves what is a client's own before any update comes."""
        return call.to_each(rule=server.client_rule.prescription) if self.personal else super().requests(server, call)

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        if self.personal is not True:
            return super().server_round(server, fleet, call)
        inbox = server.admit(fleet.ask(self.requests(server, call), SmashedData, UnlabelledData))
        loss, multipliers = server.backward(inbox)
        counted = server.acknowledged(fleet.ask(multipliers, Acknowledgement), inbox)
        server.publish(record_of(server, call, counted))
        server.step()
        fleet.tell(RoundEnd(call.round, [*counted], call.attempt), call.clients)
        return Outcome(loss, inbox.num_examples)


def record_of(server: Server, call: Call, counted: dict[int, int]) -> Update:
    """Who counted, and in what measure: an update of nothing, which is written and not sent.

    Args:
        server: Knows the rule of the round.
        call: The attempt.
        counted: Loss terms by client.
    """
    return Update(
        call.round, Dense([]).describe(), torch.empty(0), server.client_rule.prescription, call.round + 1,
        [*counted], weights([*counted.values()]), attempt=call.attempt,
    )  # fmt: skip
