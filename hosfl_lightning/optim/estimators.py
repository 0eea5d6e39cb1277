"""Zeroth-order estimators: projected gradients from forward evaluations alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Objective = Callable[[], Tensor]
Perturbed = Callable[[int, float], AbstractContextManager[None]]
"""``perturbed(p, scale)``: while it is open the parameters are ``θ + scale · u_p``; then they are θ's saved bits."""
Estimator = Callable[[Objective, Perturbed, int, float, Tensor | None], Tensor]


def forward_difference(
    objective: Objective, perturbed: Perturbed, probes: int, mu: float, base: Tensor | None = None
) -> Tensor:
    r"""``v_p = (f(θ + μ u_p) − f(θ)) / μ``: ``P + 1`` evaluations, or ``P`` when ``f(θ)`` is known.

    Args:
        objective: ``f`` at the current parameters: a scalar or one value a client, ``(K,)``.
        perturbed: Opens ``θ + scale · u_p``.
        probes: ``P``.
        mu: ``μ > 0``, as rounded for the distribution.
        base: ``f(θ)``, when the caller has it.

    Returns:
        ``(P,)`` or ``(P, K)`` projected gradients, fp64; bias ``O(μ)``.

    Reference: HO-SFL, arXiv 2603.14773 (its estimator); MeZO, arXiv 2305.17333.
    """
    base = objective() if base is None else base
    return torch.stack([(_at(objective, perturbed, p, mu) - base.double()) / mu for p in range(probes)])


def central_difference(
    objective: Objective, perturbed: Perturbed, probes: int, mu: float, base: Tensor | None = None
) -> Tensor:
    r"""``v_p = (f(θ + μ u_p) − f(θ − μ u_p)) / 2μ``: ``2P`` evaluations, ``base`` is not needed; bias ``O(μ²)``.

    Arguments and result as in `forward_difference`. Reference: SPSA, Spall 1992; MeZO, arXiv 2305.17333.
    """
    return torch.stack(
        [(_at(objective, perturbed, p, mu) - _at(objective, perturbed, p, -mu)) / (2 * mu) for p in range(probes)]
    )


def _at(objective: Objective, perturbed: Perturbed, probe: int, scale: float) -> Tensor:
    with perturbed(probe, scale):
        return objective().double()


ESTIMATORS: dict[str, Estimator] = {"forward": forward_difference, "central": central_difference}
