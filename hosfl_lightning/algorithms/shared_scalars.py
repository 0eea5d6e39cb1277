"""Methods whose clients are one in all but their data: scalars along shared directions make the update."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable
from torch import nn

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.callbacks.dimension_free_aggregation import DimensionFreeAggregation
from hosfl_lightning.optim import Basis, SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.servers import SplitModule
from hosfl_lightning.wire import ProjectedGradients, Update


class SharedScalars(Algorithm):
    r"""``ĝ = (1/P) Σ_p (Σ_k w_k v_kp) u_p``; how a method measures ``v_kp`` is its own matter.

    Steps 5 and 6 are `DimensionFreeAggregation`, which is added when the recipe has none.

    Args:
        probes: ``P``, directions a round.
        mu: ``μ``, smoothing length.
        estimator: ``forward`` or ``central``.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        client_optimizer: As in `Algorithm`.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `Algorithm`.

    Raises:
        ValueError: For a setting out of range.
    """

    #: What a method can measure ``v_kp`` with.
    estimators: ClassVar[tuple[str, ...]] = ("forward", "central")

    def __init__(
        self,
        probes: int,
        mu: float,
        estimator: str,
        distribution: str,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
    ) -> None:
        super().__init__(client_optimizer, client_scheduler, aggregation)
        self.probes, self.mu, self.estimator, self.distribution = probes, mu, estimator, distribution
        check_probe_settings(probes, mu, estimator, distribution, self.estimators)

    def configure_callbacks(self, given: list[Callback]) -> list[Callback]:
        """The step that is a callback.

        Raises:
            ValueError: Two of a kind, or a step that the method does not have.
        """
        super().configure_callbacks([c for c in given if not isinstance(c, DimensionFreeAggregation)])
        return missing(DimensionFreeAggregation, given)

    def setup(self, module: SplitModule, seed: int, callbacks: list[Callback]) -> None:
        """As in `Algorithm`; the step is the callback of this run."""
        super().setup(module, seed, callbacks)
        self.dimension_free_aggregation = next(c for c in callbacks if isinstance(c, DimensionFreeAggregation))

    def settings(self) -> dict[str, Any]:
        """The rule's and the probes'."""
        probes = {name: getattr(self, name) for name in ("probes", "mu", "estimator", "distribution")}
        return {**super().settings(), **probes}

    def zeroth_order(
        self, named: dict[str, nn.Parameter], rule: UpdateRule, module: nn.Module, seed: int, first_tensor: int = 0
    ) -> ZerothOrder:
        """An optimizer of ``named``, probed layer by layer in ``module``, with the settings of the method."""
        estimator = "forward" if self.estimator == "local" else self.estimator  # of what else is trained
        return ZerothOrder(
            named.items(), rule, module=module, probes=self.probes, mu=self.mu, estimator=estimator,
            distribution=self.distribution, seed=seed, first_tensor=first_tensor,
        )  # fmt: skip

    def directions(self, round: int) -> SharedDirections:
        """Of the round."""
        return self.client.optimizer.basis(round)

    def basis(self, round: int) -> Basis:
        """The round's directions."""
        return self.directions(round)

    def aggregate(self, answers: list[ProjectedGradients]) -> Update:
        """Step 5 is the callback."""
        return self.dimension_free_aggregation.aggregate(answers, self.client.optimizer, self.aggregation)


def missing(kind: type[Callback], given: list[Callback]) -> list[Callback]:
    """One of a kind where the recipe has none.

    Raises:
        ValueError: It has two.
    """
    found = [callback for callback in given if isinstance(callback, kind)]
    if len(found) > 1:
        raise ValueError(f"trainer.callbacks holds {len(found)} {kind.__name__}; a round has one, remove the others")
    return [] if found else [kind()]
