"""What a forward-only client's scalars are, known by backprop: a trial costs one backward in place of P forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from hosfl_lightning.algorithms import HOSFL, SplitFedSGD
from hosfl_lightning.optim import Basis


class ByBackprop(SplitFedSGD):
    r"""The rounds of a `HOSFL` whose clients probe, with ``v_kp = ⟨g_k, u_p⟩``: what its scalars are at ``μ → 0``.

    Args:
        method: Its directions, update rule, schedule and aggregation are taken.
    """

    def __init__(self, method: HOSFL) -> None:
        super().__init__(method.client_optimizer, method.make_scheduler, method.aggregation)
        self.method = method

    @override
    def basis(self, seed: int, round: int, sizes: Sequence[int]) -> Basis:
        """The method's directions of the round."""
        return self.method.basis(seed, round, sizes)

    @override
    def settings(self) -> dict[str, Any]:
        return self.method.settings()
