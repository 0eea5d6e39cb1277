"""Step 3 where the labels travel: the server's half, its loss and its backward, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.padding import FILL, stack_rows
from hosfl_lightning.server.contract import reached, scalar_loss
from hosfl_lightning.server.inbox import Inbox
from hosfl_lightning.server.tally import Tally
from hosfl_lightning.wire import Multiplier, SmashedData

Part = tuple[Tensor, Tensor, Tensor]
"""What one client sent, unpacked: ``z (B, S, h)``, labels, ``mask (B, S)``."""


class Backpropagation:
    """``Σ_k w_k ℓ_k`` and ``λ_k = ∂ℓ_k/∂z_k``, with ``w_k = n_k / s``.

    Args:
        server: A `hosfl_lightning.server.Server`.
    """

    def __init__(self, server: Any) -> None:
        self.server = server

    def __call__(self, inbox: Inbox, tally: Tally) -> tuple[Tensor, dict[int, Multiplier]]:
        """As of `Server.backward`."""
        server = self.server
        received = [[message.unpack() for message in group] for group in inbox.groups]
        terms = [[inbox.num_terms[message.client] for message in group] for group in inbox.groups]
        sums = server.fleet.processes.sums(list(server.module.server_parameters.values()))
        scale = tally.scaled(sums.total([sum(counts) for counts in terms]))
        multipliers: dict[int, Multiplier] = {}
        for group, parts, counts in zip(inbox.groups, received, terms):
            w = [count / scale for count in counts]
            loss, gradients = self.group(parts, sum(w), group[0]) if any(w) else (None, _zeros(parts))
            sums.add(loss)
            multipliers |= {one.client: one for one in server.multipliers(group, gradients, w)}
        return sums.finish(), multipliers

    def group(self, parts: Sequence[Part], share: float, first: SmashedData) -> tuple[Tensor, list[Tensor]]:
        """The loss of a group times its share, and what its backward leaves at each client's z."""
        server = self.server
        zs, ys, masks = zip(*parts)
        batch = server.batch(stack_rows(zs), stack_rows(ys, FILL["labels"]), stack_rows(masks))
        z = batch["z"].requires_grad_()
        with server.training(first):
            loss = scalar_loss(server.module, server.module.training_step(batch, first.round)) * share
        server.fire("on_before_backward", loss=loss)
        server.fabric.backward(loss)
        server.fire("on_after_backward")
        rows = reached(server.module, z.grad).split([len(part) for part in masks])
        return loss.detach(), [row[:, : mask.shape[1]] for row, mask in zip(rows, masks)]


def _zeros(parts: Sequence[Part]) -> list[Tensor]:
    return [torch.zeros_like(z) for z, _, _ in parts]
