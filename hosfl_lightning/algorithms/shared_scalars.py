"""Methods whose clients are one in all but their data: scalars along shared directions make the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from typing_extensions import override

from hosfl_lightning.algorithms.base import Algorithm
from hosfl_lightning.optim import Basis, Estimator, SharedDirections
from hosfl_lightning.optim.estimators import told
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.server import Server


class SharedScalars(Algorithm):
    r"""``ĝ = (1/P) Σ_p (Σ_k w_k v_kp) u_p``; how a method measures ``v_kp`` is its own matter.

    Args:
        probes: ``P``, directions a round.
        mu: ``μ``, smoothing length.
        estimator: ``forward`` or ``central``, or an `hosfl_lightning.optim.Estimator` by its class path.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.

    Raises:
        ValueError: For a setting out of range.
    """

    #: What a method can measure ``v_kp`` with.
    estimators: ClassVar[tuple[str, ...]] = ("forward", "central")
    tells = frozenset({"update"})

    def __init__(self, probes: int, mu: float, estimator: Estimator | str, distribution: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.probes, self.mu, self.distribution = probes, mu, distribution
        self.estimator = check_probe_settings(probes, mu, estimator, distribution, self.estimators)

    @override
    def settings(self) -> dict[str, Any]:
        """The rule's and the probes'."""
        return {**super().settings(), **self.client_settings_of_probes()}

    def client_settings_of_probes(self) -> dict[str, Any]:
        """``probes, mu, estimator, distribution``, and the settings of an estimator of somebody's own."""
        return {"probes": self.probes, "mu": self.mu, **told(self.estimator), "distribution": self.distribution}

    @override
    def client_settings(self) -> dict[str, Any]:
        return self.client_settings_of_probes()

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """The round's directions."""
        return SharedDirections(seed, round, self.probes, self.distribution)

    def smoothing(self, server: Server) -> float | None:
        """``μ`` as rounded, for the record; None: the coefficients have none."""
        return server.client_rule.smoothing
