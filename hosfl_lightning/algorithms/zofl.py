"""ZO-FL: the whole model at the clients, forwards alone, scalars in the place of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hosfl_lightning.aggregation import combine
from hosfl_lightning.algorithms.client_loss import told_loss, untold_loss
from hosfl_lightning.algorithms.shared_scalars import SharedScalars
from hosfl_lightning.clients.walk_endpoint import WalkEndpoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.optim import Basis, Estimator, SharedDirections, check_linear
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import ProjectedGradients


class ZOFL(SharedScalars):
    r"""Zeroth-order federated learning without a cut, dimension-free both ways (DeComFL).

    ::

        client   v_ksp = (ℓ_k(θ_ks + μ u_sp) − ℓ_k(θ_ks)) / μ,   θ_k,s+1 = θ_ks − lr (1/P) Σ_p v_ksp u_sp,   s = 0..E−1
        all      θ ← rule(θ, (1/EP) Σ_sp c̄_sp u_sp),   c̄_sp = E Σ_k w_k v_ksp

    θ is the whole model, both halves; the recipe says so with ``model.init_args.client_holds: whole``. ``E · P``
    scalars go up and come down; no labels, no smashed data. ``P + 1`` forwards a local step (``2P`` when central, whose
    training loss is the mean over both sides). A client goes back to the round's start, and then along the mean of all
    walks. With ``E > 1`` it keeps a copy of what it trains, and the rule is plain SGD, under which that is the mean of
    the clients' models. ``w_k`` counts the loss terms that a client says it has seen.

    The server's optimizer and schedule are not used.

    The paper: about 1 MB in total per client; SST-2 85.6 with OPT-125M and 91.2 with OPT-1.3B after 2,000 rounds.

    ``client_optimizer`` moves θ: plain SGD for ``local_steps > 1``.

    Args:
        probes: ``P``, directions a local step.
        mu: ``μ``, smoothing length.
        estimator: ``forward`` (the paper's), ``central``, or an `hosfl_lightning.optim.Estimator` by its class path.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        local_steps: ``E``, minibatches and steps of a client in a round.

    Raises:
        ValueError: For a setting out of range, or another rule than plain SGD with several local steps.

    Reference: DeComFL, arXiv 2405.15861.
    """

    endpoint = WalkEndpoint
    client_holds = "whole"
    server_order = "none"
    joint = False

    def __init__(
        self,
        probes: int = 2,
        mu: float = 1e-3,
        estimator: Estimator | str = "forward",
        distribution: str = "rademacher",
        *,
        local_steps: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(probes=probes, mu=mu, estimator=estimator, distribution=distribution, **kwargs)
        if not 1 <= local_steps <= 4096 // probes:
            raise ValueError(
                f"trainer.algorithm: local_steps must be between 1 and {4096 // probes}, so that a round has at most "
                f"4096 probes of {probes} a step, got {local_steps}"
            )
        if local_steps > 1:
            check_linear(self.client_optimizer, f"ZOFL with local_steps={local_steps}")
        self.local_steps = local_steps

    @override
    def client_settings(self) -> dict[str, Any]:
        return {**super().client_settings(), "local_steps": self.local_steps}

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """All ``E · P`` of the round."""
        return SharedDirections(seed, round, self.local_steps * self.probes, self.distribution)

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        asked: list[ProjectedGradients] = fleet.ask(
            call.to_each(rule=server.client_rule.prescription), ProjectedGradients
        )
        for answer in asked:
            if (reason := untold_loss(answer)) is not None:
                fleet.refuse(answer.client, reason)
        answers = server.screen([answer for answer in asked if answer.client not in fleet.refused])
        update = server.record(combine(answers, server.client_rule, self.aggregation, self.smoothing(server)))
        fleet.tell(update, call.online)
        return Outcome(told_loss(answers), sum(answer.num_examples for answer in answers))
