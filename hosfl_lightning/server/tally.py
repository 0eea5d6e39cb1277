"""What the groups of a step leave behind: counts, and the scale of what autograd adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from hosfl_lightning.server.inbox import Inbox


class Counted(Protocol):
    """Knows how many loss terms each client has."""

    @property
    def num_terms(self) -> dict[int, int]:
        """``n_k`` by client."""


@dataclass
class Tally:
    r"""``∇ = (s / Σ_k n_k) Σ_g ∇_g``, ``∇_g = Σ_{k∈g} (n_k / s) ∂ℓ_k/∂θ_s``, over the groups of a step.

    ``s`` is the number of loss terms of the first group that has any, so that of one group nothing is rescaled.

    Args:
        awaited: Clients of groups that are yet to come.
        num_terms: ``n_k`` by client, of those heard.
        num_examples: Of the clients heard.
        scale: ``s``.
        loss: ``Σ_k (n_k / s) ℓ_k``, 0-d; None: nobody has told any.
    """

    awaited: int = 0
    num_terms: dict[int, int] = field(default_factory=dict)
    num_examples: int = 0
    scale: int = 0
    loss: Tensor | None = None

    @property
    def heard(self) -> int:
        """Clients that have a loss term."""
        return sum(count > 0 for count in self.num_terms.values())

    def scaled(self, terms: int) -> int:
        """``s``, where a group has so many loss terms."""
        self.scale = self.scale or terms
        return self.scale or 1

    def add(self, inbox: Inbox, loss: Tensor | None) -> None:
        """A group is done."""
        self.num_terms |= inbox.num_terms
        self.num_examples += inbox.num_examples
        if loss is not None:
            self.loss = loss if self.loss is None else self.loss + loss

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """All groups are done, in one process: loss and gradients become the mean over all loss terms."""
        share = self.scale / sum(self.num_terms.values())
        if share != 1:
            self.loss = self.loss if self.loss is None else self.loss * share
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(share)
