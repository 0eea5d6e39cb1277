"""Step 3 where labels and loss stay with the clients: the server's backward is a conversation with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.models.checks import LIMIT
from hosfl_lightning.padding import stack_rows
from hosfl_lightning.server.inbox import Inbox
from hosfl_lightning.server.tally import Tally
from hosfl_lightning.wire import MiddleOutput, Multiplier, OutputMultiplier, UnlabelledData


@dataclass(frozen=True)
class Waiting:
    """A group's forward through the middle, with its graph, until λ₂ comes.

    Args:
        group: What the clients sent.
        z: ``z₁ (B, S, h)`` of all of them, a leaf.
        output: ``z₂ = f_s(z₁; θ_s)``, ``(B, S, h)``.
        rows: Each client's examples.
    """

    group: Sequence[UnlabelledData]
    z: Tensor
    output: Tensor
    rows: list[slice]

    def parts(self, of: Tensor) -> dict[int, Tensor]:
        """By client, its own part of a tensor like ``z``."""
        return {m.client: of[rows, : m.mask.shape[1]] for m, rows in zip(self.group, self.rows)}


class UShapedBackward:
    r"""``z₂`` down, ``λ₂ = ∂ℓ_k/∂z₂`` up, and from it the gradients of the middle and ``λ_k = ∂ℓ_k/∂z₁``.

    ::

        θ_s   Σ_k w_k (∂z₂/∂θ_s)ᵀ λ₂,   λ_k = (∂z₂/∂z₁)ᵀ λ₂,   w_k = n_k / Σ n over those whose λ₂ came

    All groups run forward before the first is asked, so that every graph of a round is held at once.

    Args:
        server: A `hosfl_lightning.server.Server`.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        self.codecs, self.reports = server.terms.codecs, server.terms.settings["report_loss"]

    def __call__(self, inbox: Inbox, tally: Tally) -> tuple[Tensor | None, dict[int, Multiplier], Inbox]:
        """As of `Server.backward`, and what is left of the inbox.

        Raises:
            TooFewClientsError: Too few have sent λ₂.
        """
        server = self.server
        waiting = [self.forward(group) if group else None for group in inbox.groups]
        answers = self.converse([one for one in waiting if one is not None], inbox.num_terms)
        inbox = left_of(inbox, answers)
        server.require_in(inbox, tally)
        sums = server.fleet.processes.sums(list(server.module.server_parameters.values()))
        counts = [sum(inbox.num_terms[m.client] for m in group) for group in inbox.groups]
        scale, multipliers = tally.scaled(sums.total(counts)), dict[int, Multiplier]()
        for one, group, count in zip(waiting, inbox.groups, counts):
            w = {m.client: inbox.num_terms[m.client] / scale for m in group}
            sums.add(self.backward(one, answers, w) if one is not None and count else None)
            if one is not None:
                gradients = one.parts(one.z.grad if one.z.grad is not None else torch.zeros_like(one.z))
                packed = server.multipliers(group, [gradients[k] for k in w], [*w.values()])
                multipliers |= {message.client: message for message in packed}
        loss = sums.finish()
        return (loss if self.reports else None), multipliers, inbox

    def forward(self, group: Sequence[UnlabelledData]) -> Waiting:
        """The middle's output, with a graph."""
        server, masks = self.server, [message.mask for message in group]
        z = stack_rows([message.unpack(message.mask) for message in group]).to(server.fabric.device).requires_grad_()
        mask = stack_rows(masks).long().to(server.fabric.device)
        with server.training(group[0]):
            output = server.module.server_half(z, mask)
        ends = torch.tensor([len(mask) for mask in masks]).cumsum(0).tolist()
        return Waiting(group, z, output, [slice(end - len(mask), end) for end, mask in zip(ends, masks)])

    def converse(self, waiting: Sequence[Waiting], num_terms: Mapping[int, int]) -> dict[int, OutputMultiplier]:
        """z₂ to each client that has a loss term; λ₂ of those that can be taken."""
        server, requests = self.server, dict[int, MiddleOutput]()
        for one in waiting:
            outputs = one.parts(one.output.detach())
            for message in one.group:
                if num_terms[message.client]:
                    requests[message.client] = MiddleOutput.pack(
                        message.round, message.client, outputs[message.client], message.mask,
                        codec=self.codecs["smashed_data"], seed=server.seed, step=message.step,
                        attempt=message.attempt,
                    )  # fmt: skip
        taken = {}
        for answer in server.fleet.ask(requests, OutputMultiplier):
            reason = objection(answer, requests[answer.client], self.reports)
            if reason is None:
                taken[answer.client] = answer
            else:
                server.fleet.refuse(answer.client, reason)
        return taken

    def backward(self, one: Waiting, answers: Mapping[int, OutputMultiplier], w: Mapping[int, float]) -> Tensor:
        """Gradients of ``Σ_k w_k ℓ_k`` over a group; what is told of that loss, 0-d."""
        server, joint, loss = self.server, torch.zeros_like(one.output), 0.0
        for message, part in zip(one.group, one.parts(joint).values()):
            if w.get(message.client):
                answer = answers[message.client]
                part.copy_(w[message.client] * answer.unpack(message.mask).to(part.device))
                loss += w[message.client] * (answer.loss if answer.loss is not None else 0.0)
        told = torch.tensor(loss, device=joint.device)
        server.fire("on_before_backward", loss=told)
        server.fabric.backward(one.output, joint)
        server.fire("on_after_backward")
        return told


def left_of(inbox: Inbox, answers: Mapping[int, OutputMultiplier]) -> Inbox:
    """Without those that have a loss term and sent no λ₂ for it; their places stay."""
    num_terms = {k: n for k, n in inbox.num_terms.items() if not n or k in answers}
    groups = [[message for message in group if message.client in num_terms] for group in inbox.groups]
    return replace(inbox, groups=groups, num_terms=num_terms)


def objection(answer: OutputMultiplier, request: MiddleOutput, reports: bool) -> str | None:
    """Why no middle can backpropagate what a client sent, in words; None: it can."""
    theirs, mine = answer.multiplier, request.z
    if (len(theirs.values), theirs.width, theirs.dtype) != (len(mine.values), mine.width, mine.dtype):
        return (
            f"its output multiplier is {len(theirs.values)} rows of {theirs.width} {theirs.dtype}, the middle's output "
            f"{len(mine.values)} of {mine.width} {mine.dtype}"
        )
    largest = float(theirs.restore().abs().amax()) if len(theirs.values) else 0.0
    if largest > LIMIT:
        return f"its output multiplier reaches {largest:g}, beyond ±{LIMIT:g}"
    if reports and answer.loss is None:
        return "it keeps its loss to itself, and the run's clients report theirs"
    return None
