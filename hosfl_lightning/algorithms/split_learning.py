"""Split learning: clients one after the other, each goes on where the one before it has stopped."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.algorithms.local_training import LocalSplitTraining
from hosfl_lightning.optim import UpdateRule
from hosfl_lightning.wire import Weights


class SplitLearning(LocalSplitTraining):
    r"""A relay: the client half is handed from client to client, in the order of their numbers; nothing is averaged.

    ::

        for client k, step e:   θ_s ← rule(θ_s, ∂ℓ_k/∂θ_s),  λ = ∂ℓ_k/∂z;   θ_c ← rule(θ_c, ∇⟨λ, f_c(x; θ_c)⟩)

    So a round of K clients is K · E steps, each on one client's minibatch. The weights travel through the server, as in
    the paper's centralised mode; moments stay with their clients. After a client that is refused the next one begins
    where the refused one did. Arguments as in `LocalTraining`, without ``aggregation``.

    Reference: Gupta and Raskar, Distributed learning of deep neural network over multiple agents, arXiv 1810.06060.
    """

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        local_steps: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(client_optimizer, client_scheduler, None, local_steps, checkpointing)

    def hand_on(self, shared: Tensor, answer: Sequence[Weights]) -> Tensor:
        """The client's weights, or what it had received."""
        return self.content(answer[0]) if answer else shared

    def merge(self, before: Tensor, answers: Sequence[Weights]) -> Tensor:
        """The last client's weights."""
        return self.content(answers[-1])
