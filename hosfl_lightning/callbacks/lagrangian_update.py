"""LagrangianUpdate: step 4 of a round, the clients' answer to λ, as far as the server sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.server import Inbox
from hosfl_lightning.wire import Multiplier


class LagrangianUpdate(RoundCallback):
    r"""``v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩``: λ arrives at the cut, scalars come out.

    Added when a recipe has none. It sees what the server has: z as it arrived, λ as it leaves. In a plain Trainer it
    watches `HybridOrder`, which makes one where ``callbacks`` has none; a round is then an optimizer step, and the
    clients are its micro-batches on this rank.

    | logged key | meaning | unit |
    |---|---|---|
    | ``client/multiplier_norm`` | ``‖λ‖₂`` over all clients of the round | nats per activation |
    | ``client/lagrangian_term`` | ``Σ_k ⟨λ_k, z_k⟩`` before the update | nats |

    Reference: HO-SFL, arXiv 2603.14773.
    """

    needs = "answers"

    def __init__(self) -> None:
        self._seen: list[tuple[list[int], Tensor, Tensor]] = []  # of one client, or of a group

    @override
    def on_multipliers(self, inbox: Inbox, multipliers: Mapping[int, Multiplier]) -> None:
        squares, terms, clients = list[Tensor](), list[Tensor](), [message.client for message in inbox.messages]
        for message in inbox.messages:
            z = message.z.restore().float().flatten()
            multiplier = multipliers[message.client].multiplier.restore().float().flatten().to(z.device)
            squares.append(torch.dot(multiplier, multiplier))
            terms.append(torch.dot(multiplier, z))
        if clients:
            self._seen.append((clients, torch.stack(squares), torch.stack(terms)))

    def saw(self, client: int, square: Tensor, term: Tensor) -> None:
        """``‖λ_k‖²`` and ``⟨λ_k, z_k⟩`` of a client, 0-d."""
        self._seen.append(([client], square[None], term[None]))

    @override
    def forget(self) -> None:
        self._seen = []

    @override
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log what the clients of the round left, in whatever process they ran."""
        seen = [[*row] for clients, *held in self._seen for row in zip(clients, *(one.tolist() for one in held))]
        self._seen = []
        if hasattr(trainer, "processes"):  # a plain Trainer's ranks are clients of their own
            seen = trainer.processes.in_client_order(seen)
        if seen:
            _, squares, terms = zip(*seen)
            pl_module.log("client/multiplier_norm", math.sqrt(sum(squares)))
            pl_module.log("client/lagrangian_term", sum(terms))
