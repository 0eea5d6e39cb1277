"""Zeroth-order estimators: projected gradients from forward evaluations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Objective = Callable[[], Tensor]


class EstimatorError(ValueError):
    """The estimator cannot serve this model; the message names the setting and what to take."""


@dataclass(frozen=True)
class Probes:
    """How an estimator moves the parameters; afterwards they have θ's saved bits.

    Args:
        count: ``P``.
        mu: ``μ > 0``, as rounded for the distribution.
        shifted: ``shifted(p, scale)``: while it is open the parameters are ``θ + scale · u_p``.
        dual: ``dual(p)``: while it is open they are the dual numbers ``θ + ε u_p``.
    """

    count: int
    mu: float
    shifted: Callable[[int, float], AbstractContextManager[None]]
    dual: Callable[[int], AbstractContextManager[None]]


Estimator = Callable[[Objective, Probes, Tensor | None], Tensor]


def forward_difference(objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
    r"""``v_p = (f(θ + μ u_p) − f(θ)) / μ``: ``P + 1`` evaluations, or ``P`` when ``f(θ)`` is known.

    Args:
        objective: ``f`` at the current parameters: a scalar or one value a client, ``(K,)``.
        probes: The directions and ``μ``.
        base: ``f(θ)``, when the caller has it.

    Returns:
        ``(P,)`` or ``(P, K)`` projected gradients, fp64; bias ``O(μ)``.

    Reference: HO-SFL, arXiv 2603.14773 (its estimator); MeZO, arXiv 2305.17333.
    """
    base = objective() if base is None else base
    moved = torch.stack([_at(objective, probes, p, probes.mu) for p in range(probes.count)])
    return (moved - base.double()) / probes.mu


def central_difference(objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
    r"""``v_p = (f(θ + μ u_p) − f(θ − μ u_p)) / 2μ``: ``2P`` evaluations, ``base`` is not needed; bias ``O(μ²)``.

    Arguments and result as in `forward_difference`. Reference: SPSA, Spall 1992; MeZO, arXiv 2305.17333.
    """
    mu = probes.mu
    sides = [(_at(objective, probes, p, mu), _at(objective, probes, p, -mu)) for p in range(probes.count)]
    return torch.stack([(plus - minus) / (2 * mu) for plus, minus in sides])


def forward_derivative(objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
    r"""``v_p = d/dε f(θ + ε u_p) at ε = 0``, by dual numbers: ``P`` evaluations, exact, no ``μ``; no graph is kept.

    A dual forward computes value and derivative of every activation, and takes more than twice a plain forward's time
    and activations. Attention runs in its plain kernel, the only one with forward derivatives.

    Arguments and result as in `forward_difference`; ``base`` is not needed.

    Raises:
        EstimatorError: The model has an operation without a forward derivative, or none reaches the objective.

    Reference: Baydin et al., Gradients without backpropagation, arXiv 2202.08587.
    """
    try:
        with _plain_attention():
            return torch.stack([_derivative(objective, probes, p) for p in range(probes.count)])
    except NotImplementedError as error:
        if "forward" not in str(error):  # the objective's own
            raise
        raise EstimatorError(
            f"estimator: jvp needs a forward derivative of every operation of the client half, and one has none "
            f"({str(error).splitlines()[0]}); load the model with attn_implementation: eager, or set estimator: central"
        ) from error


def _at(objective: Objective, probes: Probes, probe: int, scale: float) -> Tensor:
    with probes.shifted(probe, scale):
        return objective().double()


def _derivative(objective: Objective, probes: Probes, probe: int) -> Tensor:
    with forward_ad.dual_level(), probes.dual(probe):
        tangent = forward_ad.unpack_dual(objective()).tangent
    if tangent is None:
        raise EstimatorError("estimator: jvp: no derivative reaches the objective, because it does not run module=, or "
                             "something on the way detaches; set estimator: central")  # fmt: skip
    return tangent.double()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """The fused kernels have no forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


ESTIMATORS: dict[str, Estimator] = {
    "forward": forward_difference, "central": central_difference, "jvp": forward_derivative,
}  # fmt: skip
