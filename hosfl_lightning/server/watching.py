"""What may be seen, and by whom, between the messages of a round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hosfl_lightning.server.inbox import Inbox
from hosfl_lightning.wire import Multiplier, ProjectedGradients, Update


class RoundWatcher:
    """Told by the server, in this order; every method may be left out."""

    def on_multipliers(self, inbox: Inbox, multipliers: Mapping[int, Multiplier]) -> None:
        """λ is known, of this process's clients; nobody has moved."""

    def on_answers(self, answers: list[ProjectedGradients]) -> list[ProjectedGradients]:
        """This process's clients have answered; what is to be aggregated of it."""
        return answers

    def on_update(self, update: Update) -> None:
        """The update is on record; nobody has moved."""

    def before_step(self) -> None:
        """The server's half is about to move."""


def alters_answers(callback: Any) -> bool:
    """Whether it is told single answers, and may change them."""
    return isinstance(callback, RoundWatcher) and type(callback).on_answers is not RoundWatcher.on_answers
