"""HOSL: the server backpropagates and evaluates the clients' probes; one scalar a probe comes down."""

from __future__ import annotations

from typing_extensions import override

from hosfl_lightning.aggregation import combine
from hosfl_lightning.algorithms.two_point import TwoPoint
from hosfl_lightning.fleet.base import Fleet
from hosfl_lightning.server import Call, Outcome, Server
from hosfl_lightning.wire import SmashedData


class HOSL(TwoPoint):
    r"""Hybrid-order split learning: the client is perturbed, the server says what its loss makes of that.

    ::

        client   z_k = f_c(x_k; θ_c),  z_kp± = f_c(x_k; θ_c ± μ u_p),  p = 1..P
        server   v_kp = (ℓ_k(f_s(z_kp⁺; θ_s), y_k) − ℓ_k(f_s(z_kp⁻; θ_s), y_k)) / 2μ,  without dropout
                 θ_s ← rule(Σ_k w_k ∂ℓ_k/∂θ_s) at z_k
        all      θ_c ← rule(θ_c, (1/P) Σ_p (Σ_k w_k v_kp) u_p)

    A client runs ``2P + 1`` forwards at inference memory, and as many z go up; the server runs ``2P`` forwards a client
    beside its step. `HOSFL` gets the same ``v_kp``, up to ``O(μ²)``, from one λ.

    The paper, on BoolQ: client memory 8.67 → 2.36 GB (OPT-125M) and 15.41 → 7.23 GB (OPT-1.3B); accuracy within 0.2 to
    4.2 points of first order.

    Reference: HOSL, arXiv 2601.10940.
    """

    tells = frozenset({"multipliers", "update"})

    @override
    def server_round(self, server: Server, fleet: Fleet, call: Call) -> Outcome:
        """λ stays at the server, which evaluates the probes at the θ_s that it was made with."""
        inbox = server.admit(fleet.ask(call.to_each(), SmashedData))
        loss, _ = server.backward(inbox)
        answers = server.screen(self.answers(server, inbox, self.losses(server, fleet, call, inbox)), inbox)
        update = server.record(combine(answers, server.client_rule, self.aggregation, self.smoothing(server)))
        server.step()
        fleet.tell(update, call.online)
        return Outcome(loss, inbox.num_examples)
