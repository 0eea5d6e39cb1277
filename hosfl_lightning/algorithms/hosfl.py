"""HO-SFL: the server backpropagates, the clients do not, scalars are aggregated."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.clients import Anchor, Cohort, ForwardOnlyClient, SplitClient
from hosfl_lightning.optim import Basis, UpdateRule, ZerothOrder
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import ProjectedGradients, Update


class HOSFL(SplitRound):
    r"""Hybrid-order split federated learning: scalars up, scalars down, whatever the model's size.

    ::

        server   θ_s ← rule(Σ_k w_k ∂ℓ_k/∂θ_s),  λ_k = ∂ℓ_k/∂z_k
        client   v_kp = (1/μ) ⟨λ_k, f_c(x_k; θ_c + μ u_p) − z_k⟩,  p = 1..P
        all      ĝ = (1/P) Σ_p (Σ_k w_k v_kp) u_p,  θ_c ← rule(θ_c, ĝ)

    Step 4 is `LagrangianUpdate`, steps 5 and 6 are `DimensionFreeAggregation`; each is added when the recipe has none.

    Args:
        probes: ``P``, directions a round; the client runs ``P + 1`` forwards (``2P + 1`` when central).
        mu: ``μ``, smoothing length.
        estimator: ``forward`` (the paper's) or ``central``.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        client_optimizer: Update rule on θ_c.
        first_order_optimizer: Rule of the first-order control, tuned on its own; None: the client's.
        client_scheduler: As in `Algorithm`; the first-order control has it too.
        aggregation: As in `Algorithm`: ``WeightedMean``, ``Median``, ``TrimmedMean`` or ``NormClippedMean``.

    Raises:
        ValueError: For a setting out of range.

    Reference: HO-SFL, arXiv 2603.14773, algorithm 1.
    """

    def __init__(
        self,
        probes: int = 2,
        mu: float = 1e-3,
        estimator: str = "forward",
        distribution: str = "rademacher",
        client_optimizer: UpdateRule | None = None,
        first_order_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
    ) -> None:
        super().__init__(client_optimizer, client_scheduler, aggregation)
        self.first_order_optimizer = first_order_optimizer
        self.probes, self.mu, self.estimator, self.distribution = probes, mu, estimator, distribution
        check_probe_settings(probes, mu, estimator, distribution)

    def configure_callbacks(self, given: list[Callback]) -> list[Callback]:
        """The two steps that are callbacks.

        Raises:
            ValueError: Two of a kind.
        """
        return _missing(LagrangianUpdate, given) + _missing(DimensionFreeAggregation, given)

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """As in `Algorithm`; the steps are the callbacks of this run."""
        super().setup(module, seed, callbacks)
        self.lagrangian_update = next(c for c in callbacks if isinstance(c, LagrangianUpdate))
        self.dimension_free_aggregation = next(c for c in callbacks if isinstance(c, DimensionFreeAggregation))

    def settings(self) -> dict[str, Any]:
        """The rule's and the probes'."""
        probes = {name: getattr(self, name) for name in ("probes", "mu", "estimator", "distribution")}
        return {**super().settings(), **probes}

    def make_client(self, module: SplitModule, seed: int) -> SplitClient:
        """A `ForwardOnlyClient` with layer-wise probes."""
        named = module.client_parameters
        optimizer = ZerothOrder(
            named.items(), self.client_optimizer, module=module.client_half, probes=self.probes, mu=self.mu,
            estimator=self.estimator, distribution=self.distribution, seed=seed,
        )  # fmt: skip
        return ForwardOnlyClient(module.client_half, optimizer)

    def basis(self, round: int) -> Basis:
        """``SharedDirections`` of the round."""
        return self.client.optimizer.basis(round)

    def answer(
        self, batch: dict[str, Tensor], anchor: Anchor, multiplier: Tensor, cohort: Cohort, basis: Basis
    ) -> Tensor:
        """Step 4 is the callback."""
        return self.lagrangian_update.answer(self.client, batch, anchor, multiplier, cohort, basis)

    def give_up(self) -> None:
        """The step's figures as well."""
        self.lagrangian_update.forget()

    def aggregate(self, answers: list[ProjectedGradients]) -> Update:
        """Step 5 is the callback."""
        return self.dimension_free_aggregation.aggregate(answers, self.client.optimizer, self.aggregation)


def _missing(kind: type[Callback], given: list[Callback]) -> list[Callback]:
    found = [callback for callback in given if isinstance(callback, kind)]
    if len(found) > 1:
        raise ValueError(f"trainer.callbacks holds {len(found)} {kind.__name__}; a round has one, remove the others")
    return [] if found else [kind()]
