"""Methods whose clients train on their own in a round; whole vectors are averaged at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.aggregation import aggregated
from hosfl_lightning.aggregation.weights import weights
from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.algorithms.client_loss import untold_loss
from hosfl_lightning.clients.local_endpoint import LocalSplitEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import Message, ProjectedGradients, RoundEnd, SmashedData, StepRequest, Weights

Losses = list[tuple[Tensor, int]]
"""Training losses, 0-d, and the loss terms that each is the mean of."""


class LocalTraining(Algorithm):
    r"""``θ_k ← E local steps from θ;  θ ← θ + Σ_k w_k (θ_k − θ)``.

    The clients run one after the other. Each receives the shared weights, takes its steps with an optimizer state of
    its own, which stays with it, and sends its weights back. ``w_k`` counts the loss terms it has trained on. A client
    that was away misses nothing: it receives the weights when it is sampled again.

    Args:
        local_steps: ``E``, minibatches and steps of a client in a round.
        checkpointing: Clients keep each layer's input instead of its graph and run it twice.

    ``aggregation`` is over the clients' changes.

    Raises:
        ValueError: For a setting out of range.
    """

    joint = False
    records = keeps = False
    #: Whether the training loss is one that only the clients know.
    client_loss: ClassVar[bool] = True

    def __init__(self, *args: Any, local_steps: int = 1, checkpointing: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if local_steps < 1:
            raise ValueError(f"trainer.algorithm: local_steps must be >= 1, got {local_steps}")
        self.local_steps, self.checkpointing = local_steps, checkpointing

    @override
    def client_settings(self) -> dict[str, Any]:
        return {"local_steps": self.local_steps, "checkpointing": self.checkpointing}

    def due(self, round: int, step: int) -> bool:
        """Whether z goes up at that local step."""
        return False

    def replied(self, round: int, step: int) -> bool:
        """Whether λ comes down for the z of that local step."""
        return True

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """One client after the other; the loss is the mean over the loss terms of all local steps."""
        replica, before, held = server.replica, server.replica.vector(), server.state()
        try:
            shared, answers, losses = before, list[Weights](), Losses()
            for client in fleet.own:
                answer = self.visit(server, fleet, call, client, shared, losses)
                answers += answer
                shared = self.hand_on(server, shared, answer)
            server.require(sum(answer.num_terms > 0 for answer in answers))
        except BaseException:
            replica.load(before)
            server.put(*held)
            raise
        replica.load(self.merge(server, before, answers))
        fleet.tell(
            RoundEnd(call.round, [a.client for a in answers if a.client is not None], call.attempt), call.clients
        )
        return Outcome(mean_of(losses), sum(answer.num_examples for answer in answers))

    def visit(
        self, server: Server, fleet: Fleet, call: Call, client: int, shared: Tensor, losses: Losses
    ) -> list[Weights]:
        """Weights down, local steps, weights up; what the server takes of them: one message, or none.

        A client that is refused leaves nothing behind but what a shared server has learned from its earlier steps.
        """
        request = server.replica.message(shared, call.round, client, call.attempt)
        own: Losses = []
        answers: list[Weights] = self.follow(server, fleet, request, Weights, own)
        seen = self.seen(call.round, own)
        answers = [answer for answer in answers if self.taken(server, fleet, client, answer, seen)]
        for answer in answers:
            losses += own if answer.loss is None else [(torch.tensor(answer.loss), answer.num_terms)]
        return answers

    def seen(self, round: int, own: Losses) -> int | None:
        """A client's loss terms, where the server has counted those of every local step."""
        everywhere = all(self.due(round, step) for step in range(self.local_steps))
        return sum(n for _, n in own) if everywhere else None

    def taken(
        self, server: Server, fleet: Fleet, client: int, answer: Weights | ProjectedGradients, seen: int | None
    ) -> bool:
        """Whether a client's last answer can be believed; one that cannot is refused.

        Args:
            server: Knows what the weights must be.
            fleet: Where it is.
            client: Whose.
            answer: Its last.
            seen: Its loss terms where the server has counted all of them; one that claims more would own the mean.
        """
        reason = server.replica.objection(answer) if isinstance(answer, Weights) else None
        if reason is None and seen not in (None, answer.num_terms):
            reason = f"it claims {answer.num_terms} loss terms, its labels have {seen}"
        if reason is None and self.client_loss:
            reason = untold_loss(answer)
        if reason is not None:
            fleet.refuse(client, reason)
        return reason is None

    def follow(
        self, server: Server, fleet: Fleet, request: Any, last: type[Weights | ProjectedGradients], losses: Losses
    ) -> list[Any]:
        """A client's round from its first request to its ``last`` answer: the server steps on every z on the way.

        Args:
            server: Whose half it is.
            fleet: The client is there.
            request: What begins its round.
            last: What ends it.
            losses: Takes the server's, of each z.
        """
        client: int = request.client
        while arrived := fleet.ask({client: request}, SmashedData, last):
            [message] = arrived
            if isinstance(message, last):
                return [message]
            if message.step >= self.local_steps or not self.due(message.round, message.step):
                fleet.refuse(client, f"it sent smashed data of local step {message.step}, for which none are due")
                return []
            inbox = server.admit_one(message)
            if inbox is None:
                return []
            loss, multipliers = server.backward(inbox)
            assert loss is not None  # the server has the labels
            server.step()
            losses.append((loss, inbox.num_terms[client]))
            go_on: Message = StepRequest(message.round, client, message.attempt, message.step + 1)
            request = multipliers[client] if self.replied(message.round, message.step) else go_on
        return []

    def hand_on(self, server: Server, shared: Tensor, answer: Sequence[Weights]) -> Tensor:
        """What the next client begins with: as the others, the shared weights."""
        return shared

    def merge(self, server: Server, before: Tensor, answers: Sequence[Weights]) -> Tensor:
        """``θ + Σ_k w_k (θ_k − θ)``."""
        return self.average(before, [server.replica.content(a) for a in answers], [a.num_terms for a in answers])

    def average(self, before: Tensor, after: Sequence[Tensor], num_terms: Sequence[int]) -> Tensor:
        """`merge` of vectors; one without a loss term behind it does not count."""
        counted = [(vector, n) for vector, n in zip(after, num_terms) if n]
        changes = torch.stack([vector - before for vector, _ in counted])
        return before + aggregated(self.aggregation, changes, weights([n for _, n in counted]))


class LocalSplitTraining(LocalTraining):
    r"""Local steps through the cut: ``z`` up, one server step, ``λ`` down, ``θ_k ← rule(θ_k, ∇⟨λ, f_c(x; θ_k)⟩)``."""

    endpoint = LocalSplitEndpoint
    client_loss = False

    @override
    def due(self, round: int, step: int) -> bool:
        return True


def mean_of(losses: Losses) -> Tensor:
    """The mean over all loss terms, 0-d."""
    terms = sum(n for _, n in losses)
    return torch.stack([loss.cpu() * (n / terms) for loss, n in losses]).sum()
