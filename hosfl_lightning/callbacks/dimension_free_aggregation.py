"""DimensionFreeAggregation: steps 5 and 6 of a round, scalars in, one update out."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from hosfl_lightning.callbacks.round_callback import RoundCallback
from hosfl_lightning.wire import Update


class DimensionFreeAggregation(RoundCallback):
    r"""``v̄_p = Σ_k w_k v_kp`` (or another mean), then ``θ_c ← rule(θ_c, (1/P) Σ_p v̄_p u_p)`` at every client alike.

    What travels is ``P`` scalars each way; no weight vector, whatever the model's size. Added
    when a recipe has none; it sees the update that goes on record. In a plain Trainer it watches `HybridOrder`, which
    makes one where ``callbacks`` has none; the clients are the ranks, with equal weights.

    | logged key | meaning | unit |
    |---|---|---|
    | ``client/projected_gradient_rms`` | root mean square of ``v̄_p``; of directions about ``‖∇θ_c‖`` | nats / unit |
    | ``client/lr`` | learning rate of the update | – |

    Reference: HO-SFL, arXiv 2603.14773; DeComFL, arXiv 2405.15861.
    """

    needs = "update"

    def __init__(self) -> None:
        self._update: Update | None = None

    @override
    def on_update(self, update: Update) -> None:
        self._update = update

    @override
    def report(self, trainer: Any, pl_module: Any) -> None:
        """Log the round's update."""
        if self._update is not None:
            pl_module.log("client/projected_gradient_rms", self._update.coefficients.square().mean().sqrt())
            pl_module.log("client/lr", self._update.rule["lr"])
