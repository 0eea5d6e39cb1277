"""LagrangianUpdate: step 4 of a round, the client's answer to λ."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from typing_extensions import override

from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.clients import Anchor, Cohort, ForwardOnlyClient, SplitClient
from hosfl_lightning.optim import Basis


class LagrangianUpdate(RoundCallback):
    r"""``v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩``: λ arrives at the cut, scalars come out.

    In the first round it also checks that μ is neither lost in rounding nor beyond the linear range, and warns. In a
    plain Trainer it is a step of `HybridOrder`, which makes one where ``callbacks`` has none; a round is then an
    optimizer step, and the clients are its micro-batches on this rank.

    | logged key | meaning | unit |
    |---|---|---|
    | ``client/multiplier_norm`` | ``‖λ‖₂`` over all clients of the round | nats per activation |
    | ``client/lagrangian_term`` | ``Σ_k ⟨λ_k, z_k⟩`` before the update | nats |

    Reference: HO-SFL, arXiv 2603.14773.
    """

    def __init__(self) -> None:
        self._checked = False
        self._seen: list[tuple[int, Tensor, Tensor]] = []

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """One process checks μ, so that a warning comes once."""
        super().on_train_start(trainer, pl_module)
        self._checked = not trainer.is_global_zero

    def answer(self, client: SplitClient, batch: dict[str, Tensor], anchor: Anchor, multiplier: Tensor, cohort: Cohort,
               basis: Basis) -> Tensor:  # fmt: skip
        """``(K, P)`` projected gradients of the cohort's clients; the anchor's z is released before the first probe."""
        if not self._checked and isinstance(client, ForwardOnlyClient):
            client.check_probe(batch, anchor.z, multiplier)
            self._checked = True
        square = multiplier.float().square().sum()
        self._seen.append((cohort.clients[0], square, anchor.release(multiplier, cohort.rows).sum()))
        return client.answer(batch, anchor, multiplier, cohort.rows, basis)

    def forget(self) -> None:
        """What was answered belongs to a round that is given up."""
        self._seen = []

    @override
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log what the round's cohorts left, in whatever process they ran."""
        seen = [[client, float(square), float(term)] for client, square, term in self._seen]
        self._seen = []
        if hasattr(trainer, "transport"):  # a plain Trainer's ranks are clients of their own
            seen = trainer.transport.in_client_order(seen)
        if seen:
            _, squares, terms = zip(*seen)
            pl_module.log("client/multiplier_norm", math.sqrt(sum(squares)))
            pl_module.log("client/lagrangian_term", sum(terms))
