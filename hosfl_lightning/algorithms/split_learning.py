"""Split learning: clients one after the other, each goes on where the one before it has stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from hosfl_lightning.algorithms.local_training import LocalSplitTraining
from hosfl_lightning.server import Server
from hosfl_lightning.wire import Weights


class SplitLearning(LocalSplitTraining):
    r"""A relay: the client half is handed from client to client, in the order of their numbers; nothing is averaged.

    ::

        for client k, step e:   θ_s ← rule(θ_s, ∂ℓ_k/∂θ_s),  λ = ∂ℓ_k/∂z;   θ_c ← rule(θ_c, ∇⟨λ, f_c(x; θ_c)⟩)

    So a round of K clients is K · E steps, each on one client's minibatch. The weights travel through the server, as in
    the paper's centralised mode; moments stay with their clients. After a client that is refused the next one begins
    where the refused one did.

    Reference: Gupta and Raskar, Distributed learning of deep neural network over multiple agents, arXiv 1810.06060.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, aggregation=None, **kwargs)

    @override
    def hand_on(self, server: Server, shared: Tensor, answer: Sequence[Weights]) -> Tensor:
        """The client's weights, or what it had received."""
        return server.replica.content(answer[0]) if answer else shared

    @override
    def merge(self, server: Server, before: Tensor, answers: Sequence[Weights]) -> Tensor:
        """The last client's weights."""
        return server.replica.content(answers[-1])
