"""Zeroth-order estimators: projected gradients from forward evaluations alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from hosfl_lightning.parts import PartError, by_name, check_part, from_path
from hosfl_lightning.rendering import nearest

Objective = Callable[[], Tensor]
#: Of an estimator's result, in an error.
CONTRACT = (
    "P finite float64 values where objective() gives a scalar, (P, K) where it gives (K,), one a client; average "
    "nothing, stack one value a probe, .double()"
)


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


@dataclass(frozen=True)
class Estimator(ABC):
    """``v_p``, about ``⟨∇f, u_p⟩`` for ``p = 1..P``, from evaluations of ``f`` alone.

    A subclass is a dataclass: its fields, plain values, are its settings. A recipe names it by its class path, messages
    by its name: a client on another machine must have imported the same class. What a call returns is checked: the
    shape, the dtype, and that it is finite wherever what it evaluated is.
    """

    #: Whether it moves by ``probes.shifted``, and the result depends on ``μ``.
    smoothed: ClassVar[bool] = True
    #: Whether it evaluates at ``θ ± μ u_p``: curvature cancels, and the mean of what it evaluates is ``f(θ) + O(μ²)``,
    #: so that nobody evaluates ``f(θ)`` for the loss, or is warned of a long ``μ``.
    symmetric: ClassVar[bool] = False
    #: Whether it moves by ``probes.dual``, which needs the module that the objective runs.
    dual: ClassVar[bool] = False
    #: Whether its first evaluation is ``f(θ)``, where it is not given ``base``.
    begins_at_base: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
        """Measure.

        Args:
            objective: ``f`` at the current parameters: a scalar or one value a client, ``(K,)``.
            probes: The directions and ``μ``.
            base: ``f(θ)``, when the caller has it.

        Returns:
            ``(P,)`` or ``(P, K)``, float64, on the objective's device.
        """


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


@dataclass(frozen=True)
class ForwardDifference(Estimator):
    """`forward_difference`: ``forward``."""

    begins_at_base = True

    @override
    def __call__(self, objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
        return forward_difference(objective, probes, base)


@dataclass(frozen=True)
class CentralDifference(Estimator):
    """`central_difference`: ``central``."""

    symmetric = True

    @override
    def __call__(self, objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
        return central_difference(objective, probes, base)


@dataclass(frozen=True)
class ForwardDerivative(Estimator):
    """`forward_derivative`: ``jvp``."""

    smoothed, dual = False, True

    @override
    def __call__(self, objective: Objective, probes: Probes, base: Tensor | None = None) -> Tensor:
        return forward_derivative(objective, probes, base)


ESTIMATORS: dict[str, Estimator] = {
    "forward": ForwardDifference(), "central": CentralDifference(), "jvp": ForwardDerivative(),
}  # fmt: skip


def chosen(estimator: Estimator | str, names: Iterable[str]) -> Estimator | str:
    """An estimator as a user gives it: a shipped one by its name, one of their own as an instance.

    Args:
        estimator: A name, a class path, or an instance.
        names: Those that the caller can serve; one of somebody's own needs dual numbers only where ``jvp`` is served.

    Raises:
        ValueError: Another name, or what is no estimator here.
    """
    names = tuple(names)
    if isinstance(estimator, str) and estimator in names:
        return estimator
    if isinstance(estimator, str) and "." not in estimator:
        raise ValueError(
            f"estimator must be one of {', '.join(names)}, or the class path of an Estimator of your own, got "
            f"{estimator!r}{nearest(estimator, names)}"
        )
    own = from_path(estimator, "estimator") if isinstance(estimator, str) else estimator
    check_part(own, Estimator, "estimator")
    name = next((name for name, one in ESTIMATORS.items() if one == own), None)
    if name is None and type(own).__name__ in (*ESTIMATORS, "local"):
        raise PartError(f"estimator: {type(own).__name__} is the name of one that ships; rename the class")
    if (name or "jvp" if own.dual else name or names[0]) not in names:
        raise ValueError(f"estimator must be one of {', '.join(names)}, or of your own without dual numbers, got "
                         f"{name or type(own).__name__}")  # fmt: skip
    return name or own


def told(estimator: Estimator | str) -> dict[str, Any]:
    """What a message or a checkpoint says of what `chosen` gave: a name, and plain values below it."""
    if isinstance(estimator, str):
        return {"estimator": estimator}
    own = {k: [*v] if isinstance(v, tuple) else v for k, v in asdict(estimator).items()}
    return {"estimator": type(estimator).__name__, **{f"estimator.{k}": v for k, v in own.items()}}


def estimator_of(settings: Mapping[str, Any]) -> Estimator:
    """The estimator that ``settings`` tell of, among others.

    Raises:
        PartError: It is somebody's own, and its class is not known here, or takes other settings.
    """
    name = settings["estimator"]
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    own = {k.removeprefix("estimator."): v for k, v in settings.items() if k.startswith("estimator.")}
    return by_name(Estimator, "estimator", {"name": name, **own})


def measured(estimator: Estimator, objective: Objective, probes: Probes, base: Tensor | None) -> Tensor:
    """What the estimator returns, as its contract says.

    Raises:
        PartError: It returns something else.
    """
    own = estimator not in ESTIMATORS.values()
    seen: list[torch.Size] = [] if base is None else [base.shape]
    evaluated = [base] if own and base is not None else []

    def watched() -> Tensor:
        value = objective()
        seen[:] = [value.shape]
        evaluated.extend([value] if own else [])
        return value

    values = estimator(watched, probes, base)
    wanted = (probes.count, *(seen[0] if seen else ()))
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or values.shape != wanted or values.dtype != torch.float64:
        given = f"{tuple(values.shape)} {values.dtype}" if is_tensor else type(values).__name__
        raise PartError(
            f"estimator {type(estimator).__name__} returned {given}; an Estimator returns one float64 a direction, "
            f"{wanted} torch.float64 ({CONTRACT})"
        )
    if own and not values.isfinite().all() and all(value.isfinite().all() for value in evaluated):
        raise PartError(
            f"estimator {type(estimator).__name__} returned NaN or infinity, though all {len(evaluated)} values "
            f"of the objective are finite; mend what it divides by ({CONTRACT})"
        )
    return values
