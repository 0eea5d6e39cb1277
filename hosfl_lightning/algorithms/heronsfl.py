"""HERON-SFL: clients that never backpropagate, with a loss of their own through an auxiliary head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hosfl_lightning.aggregation import combine
from hosfl_lightning.algorithms.auxiliary_training import AuxiliaryTraining
from hosfl_lightning.algorithms.client_loss import told_loss
from hosfl_lightning.algorithms.local_training import Losses
from hosfl_lightning.clients.auxiliary_endpoint import SphereEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.optim import Basis, SharedDirections, check_linear
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import ProjectedGradients, StepRequest

#: Of one round: the generator's counter has 12 bits for them.
MAX_PROBES = 4096


class HERONSFL(AuxiliaryTraining):
    r"""Zeroth-order local steps on the client's own loss ``F(θ)``, ``θ = (θ_c, θ_a)``; the server backpropagates on z.

    ::

        client k, step e   ĝ = (1/P) Σ_p (d/μ) (F(θ_k + μ u_p) − F(θ_k)) u_p,   u_p on the unit sphere in R^d
                           θ_k ← rule(θ_k, ĝ)
        every k-th step    z goes up;  θ_s ← rule(θ_s, ∂ℓ/∂θ_s)
        all                θ ← Σ_k w_k θ_k

    Every client draws directions of its own, which are gauss16 ones over their length. A local step is ``P + 1``
    forwards at inference memory. The paper's figures, ResNet-18 on CIFAR-10 with 5 clients: a client peaks at 259 MB
    (SplitFed 710, CSE-FSL and FSL-SAGE 726), 39.9 GFLOP a step (59.5), 244 GB of traffic (SplitFedV2 391).
    GPT2-medium on E2E with 3 clients: 4.03 GB (SplitLoRA 4.59).

    With ``scalars``, which the paper does not have, all clients draw the same directions and walk by plain SGD. The
    mean of their weights then follows from the mean of their coefficients::

        θ − lr (1/P) Σ_ep (Σ_k w_k c_kep) g_ep,   c = (d/‖g‖²)(F(θ + μ g/‖g‖) − F(θ)) ‖g‖/μ

    so ``local_steps · P`` scalars travel in the place of θ, and the update log, replay and clients that were away work
    as in HO-SFL.

    Args:
        probes: ``P``, directions a local step.
        mu: ``μ``, length of the step along a direction.
        scalars: Scalars and shared directions in the place of full vectors.

    Raises:
        ValueError: For a setting out of range; with scalars, for another rule than plain SGD.

    Reference: HERON-SFL, arXiv 2601.09076.
    """

    endpoint = SphereEndpoint

    def __init__(self, probes: int = 1, mu: float = 1e-3, *args: Any, scalars: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, checkpointing=False, **kwargs)
        check_probe_settings(probes, mu, "forward", "gauss16")
        if self.local_steps * probes > MAX_PROBES:
            raise ValueError(
                f"trainer.algorithm: local_steps={self.local_steps} with probes={probes} are "
                f"{self.local_steps * probes} directions a round, the generator has {MAX_PROBES}; lower one of them"
            )
        if scalars:
            check_linear(self.client_optimizer, "HERONSFL with scalars=true")
        self.probes, self.mu, self.scalars = probes, mu, scalars
        self.records = self.keeps = scalars

    @override
    def client_settings(self) -> dict[str, Any]:
        return {**super().client_settings(), "probes": self.probes, "mu": self.mu, "scalars": self.scalars}

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis | None:
        """``SharedDirections`` of all local steps of the round, with scalars."""
        probes = self.local_steps * self.probes
        return SharedDirections(seed, round, probes, "gauss16") if self.scalars else None

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """With scalars, θ moves by one update that everybody applies."""
        if not self.scalars:
            return super().server_round(server, fleet, call)
        held = server.state()
        try:
            requests = call.to_each(rule=server.client_rule.prescription)
            answers = server.screen([a for k in fleet.own for a in self.walked(server, fleet, requests[k])])
            update = server.record(combine(answers, server.client_rule, self.aggregation, self.mu))
        except BaseException:
            server.put(*held)
            raise
        fleet.tell(update, call.online)
        return Outcome(told_loss(answers), sum(answer.num_examples for answer in answers))

    def walked(self, server: Server, fleet: Fleet, request: StepRequest) -> list[ProjectedGradients]:
        """A client's round; nothing where it is refused."""
        losses = Losses()
        answers: list[ProjectedGradients] = self.follow(server, fleet, request, ProjectedGradients, losses)
        seen = self.seen(request.round, losses)
        return [answer for answer in answers if self.taken(server, fleet, request.client, answer, seen)]

    @override
    def settings(self) -> dict[str, Any]:
        """The probes' as well."""
        return {**super().settings(), "probes": self.probes, "mu": self.mu, "scalars": self.scalars}
