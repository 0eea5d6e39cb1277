"""What the server has received of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hosfl_lightning.wire import SmashedData, UnlabelledData

Received = SmashedData | UnlabelledData
"""What begins a client's step: z with labels, or with the number of its loss terms alone."""


@dataclass(frozen=True)
class Inbox:
    """Smashed data that can be taken, with ``n_k``.

    Args:
        groups: What runs as one batch each, ascending clients over all of them. A client that was refused leaves its
            place empty: sums over several processes go by places.
        num_terms: By client, counted from its labels, or as it says where these stay with it.
    """

    groups: list[list[Any]]
    num_terms: dict[int, int]

    @classmethod
    def of(
        cls, messages: Sequence[Received], count: Callable[[Any], int], places: Sequence[int] | None = None
    ) -> Inbox:
        """Of messages in the order of their clients; ``places``: a group for each of these; None: one for all."""
        by_client = {message.client: message for message in messages}
        groups = [[*messages]] if places is None else [[by_client[k]] if k in by_client else [] for k in places]
        return cls(groups, {k: count(message) for k, message in by_client.items()})

    @property
    def messages(self) -> list[Any]:
        """All of them."""
        return [message for group in self.groups for message in group]

    @property
    def heard(self) -> int:
        """Clients that have a loss term."""
        return sum(count > 0 for count in self.num_terms.values())

    @property
    def num_examples(self) -> int:
        """Of all clients."""
        return sum(len(message.mask) for message in self.messages)
