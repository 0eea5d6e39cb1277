"""HO-SFL: the server backpropagates, the clients do not, scalars are aggregated."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.shared_scalars import SharedScalars, missing
from hosfl_lightning.algorithms.split_round import SplitRound
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.callbacks.lagrangian_update import LagrangianUpdate
from hosfl_lightning.clients import Anchor, Cohort, ForwardOnlyClient, SplitClient
from hosfl_lightning.optim import Basis, UpdateRule
from hosfl_lightning.servers import SplitModule


class HOSFL(SharedScalars, SplitRound):
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
        super().__init__(probes, mu, estimator, distribution, client_optimizer, client_scheduler, aggregation)
        self.first_order_optimizer = first_order_optimizer

    def configure_callbacks(self, given: list[Callback]) -> list[Callback]:
        """The two steps that are callbacks.

        Raises:
            ValueError: Two of a kind.
        """
        return missing(LagrangianUpdate, given) + missing(DimensionFreeAggregation, given)

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """As in `Algorithm`; the steps are the callbacks of this run."""
        super().setup(module, seed, callbacks)
        self.lagrangian_update = next(c for c in callbacks if isinstance(c, LagrangianUpdate))

    def make_client(self, module: SplitModule, seed: int) -> SplitClient:
        """A `ForwardOnlyClient` with layer-wise probes."""
        half = module.client_half
        return ForwardOnlyClient(half, self.zeroth_order(module.client_parameters, self.client_optimizer, half, seed))

    def answer(
        self, batch: dict[str, Tensor], anchor: Anchor, multiplier: Tensor, cohort: Cohort, basis: Basis
    ) -> Tensor:
        """Step 4 is the callback."""
        return self.lagrangian_update.answer(self.client, batch, anchor, multiplier, cohort, basis)

    def give_up(self) -> None:
        """The step's figures as well."""
        self.lagrangian_update.forget()
