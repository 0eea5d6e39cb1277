"""ZO-SFL: neither half backpropagates; one direction probes both at once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from typing_extensions import override

from hosfl_lightning.aggregation import combine
from hosfl_lightning.algorithms.base import plain
from hosfl_lightning.algorithms.two_point import TwoPoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.optim import UpdateRule, ZerothOrder
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import SmashedData


class ZOSFL(TwoPoint):
    r"""Zeroth-order split federated learning, joint two-point: what is left of `HOSFL` when the server has no backprop.

    ::

        u_p = (u_p^c, u_p^s),  one direction of the whole model: the server's tensors are numbered after the client's
        server    ℓ_kp± = ℓ_k(f_s(f_c(x_k; θ_c ± μ u_p^c); θ_s ± μ u_p^s), y_k),  v_kp = (ℓ_kp⁺ − ℓ_kp⁻) / 2μ,  p = 1..P
                  θ_s ← rule(θ_s, (1/P) Σ_p (Σ_k w_k v_kp) u_p^s)
        clients   θ_c ← rule(θ_c, (1/P) Σ_p (Σ_k w_k v_kp) u_p^c)

    ``2P`` forwards of either half, all without dropout, and ``2P`` z go up; z at θ itself is not needed. The labels
    travel with the first. The training loss is the mean of ``ℓ_k`` over both sides of all probes, ``ℓ_k(θ) + O(μ²)``.

    The optimizer, the schedule and the ``gradient_clip_val`` that backprop would need are not used.

    The HO-SFL paper has it as its lower line (LoRA on both halves, P = 2; HO-SFL in brackets): SST-2 52.8 (87.6) with
    OPT-125M, 51.8 (90.8) with Gemma-3-270M, 61.5 (93.9) with LLaMA-3.2-1B; RTE 52.0 (59.2), 54.2 (65.0), 49.1 (73.3).

    Args:
        server_optimizer: Update rule on θ_s; None: the clients'. Its rate follows a schedule of its own, of the kind of
            ``client_scheduler``.

    Reference: ZO-SFL in HO-SFL, arXiv 2603.14773.
    """

    server_order = "zeroth"
    probe_first = True

    def __init__(
        self,
        probes: int = 2,
        mu: float = 1e-3,
        distribution: str = "rademacher",
        *,
        server_optimizer: UpdateRule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(probes=probes, mu=mu, distribution=distribution, **kwargs)
        self.server_optimizer = server_optimizer if server_optimizer is not None else self.client_optimizer
        self.server_rule: ZerothOrder
        self.server_schedule: Any | None = None

    @override
    def setup(self, server: Server) -> None:
        super().setup(server)
        module = server.module
        self.server_rule = ZerothOrder(
            module.server_parameters.items(), self.server_optimizer, module=module.server_half, seed=server.seed,
            first_tensor=len(server.replica.trained), **self.client_settings_of_probes(),
        )  # fmt: skip
        self.server_schedule = self.make_scheduler(self.server_rule) if self.make_scheduler is not None else None

    @override
    def settings(self) -> dict[str, Any]:
        rule = {"name": type(self.server_optimizer).__name__, **self.server_optimizer.hyper_parameters()}
        return {**super().settings(), **{f"server_optimizer.{k}": plain(v) for k, v in rule.items()}}

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        inbox = server.admit(fleet.ask(call.to_each(), SmashedData))
        losses = self.losses(server, fleet, call, inbox)
        answers = server.screen(self.answers(server, inbox, losses), inbox)
        update = server.record(combine(answers, server.client_rule, self.aggregation, self.smoothing(server)))
        self.server_rule.record(update.coefficients, self.server_rule.basis(call.round))
        self.server_rule.step()
        fleet.tell(update, call.online)
        told = fleet.processes.in_client_order([[client, float(at.mean())] for client, at in losses.items()])
        mean = {int(client): loss for client, loss in told}
        loss = sum(w * mean[k] for k, w in zip(update.participants, update.weights) if w)
        return Outcome(torch.tensor(loss), inbox.num_examples)

    @override
    def probed(
        self, server: Server, fleet: Fleet, call: Call, held: dict[int, SmashedData], probe: int, side: int
    ) -> dict[int, SmashedData]:
        if probe == side == 0:  # which came with the labels and the mask
            return dict(held)
        return super().probed(server, fleet, call, held, probe, side)

    @override
    def server_at(self, round: int, probe: int, scale: float) -> AbstractContextManager[None]:
        """The server's part of the same direction."""
        return self.server_rule.perturbed(self.server_rule.basis(round), probe, scale)

    @override
    def end_round(self, server: Server) -> None:
        super().end_round(server)
        if self.server_schedule is not None:
            self.server_schedule.step()

    @override
    def state_dict(self) -> dict[str, Any]:
        schedule = self.server_schedule.state_dict() if self.server_schedule is not None else None
        return {**super().state_dict(), "server_optimizer": self.server_rule.state_dict(), "server_schedule": schedule}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.server_rule.load_state_dict(state["server_optimizer"])
        if self.server_schedule is not None:
            self.server_schedule.load_state_dict(state["server_schedule"])
