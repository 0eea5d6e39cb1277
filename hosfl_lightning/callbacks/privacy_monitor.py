"""PrivacyMonitor: how much of an example, or of a client, the answers have given away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.server.inbox import Inbox
from hosfl_lightning.wire import Multiplier


class PrivacyMonitor(RoundCallback):
    """Counts in how many answers each example or client has a part, and what that costs; `trainer.privacy` adds it.

    An answer counts when λ is sent for it, also of an attempt that fails and of a client whose answer is not taken.
    Which examples are in a minibatch counts as known: nothing is claimed for the sampling. Of clients on other machines
    only they know it, so there every answer counts for every example.

    | logged key | meaning | unit |
    |---|---|---|
    | ``privacy/epsilon`` | ε at the run's δ of the worst example or client, since the first round | – |
    | ``privacy/releases`` | answers in which that one has a part | – |

    Attributes:
        uses: By client, the answers in which each of its examples has a part; one number where they are not told apart.
    """

    def __init__(self) -> None:
        self.uses: dict[int, list[int]] = {}
        self._asked: list[list[int]] = []

    @override
    def on_multipliers(self, inbox: Inbox, multipliers: Mapping[int, Multiplier]) -> None:
        self._asked += [[client, message.round] for client, message in multipliers.items()]

    @override
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log what all rounds together have cost."""
        asked, self._asked = self._asked, []
        told_apart = trainer.privacy.level == "example" and trainer.fleet.simulated
        for client, round in (entry for part in trainer.fleet.processes.share(asked) for entry in part):
            held = len(trainer.datamodule.clients[client]) if told_apart else 1
            uses = self.uses.setdefault(client, [0] * held)
            for one in trainer.datamodule.chosen(client, round) if told_apart else [0]:
                uses[one] += 1
        pl_module.log("privacy/epsilon", trainer.privacy.spent(self.releases))
        pl_module.log("privacy/releases", self.releases)

    @property
    def releases(self) -> int:
        """Answers in which the worst example or client has a part."""
        return max(map(max, self.uses.values()), default=0)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"uses": {client: [*uses] for client, uses in self.uses.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.uses = {client: [*uses] for client, uses in state_dict["uses"].items()}
