"""Elementwise update rules on one chunk: ``hosfl-rules/1``, the same bits as on every other engine.

Every operation on elements is one fp32 operation, rounded before the next; scalars are computed in fp64 and rounded to
fp32 once. Numpy contracts nothing to a fused multiply-add, and denormal numbers are kept.

Golden vectors: ``tests/optim/golden_rules.json``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from hosfl_client.bfloat16 import Floats

f32 = np.float32


class RuleError(ValueError):
    """A rule that is not known here, or settings that it does not take."""


@dataclass(frozen=True)
class UpdateRule(ABC):
    """``θ ← rule(θ, ĝ, state)``, elementwise, so that any chunking gives the same bits.

    Args:
        lr: Learning rate, >= 0.
        weight_decay: >= 0.
    """

    known: ClassVar[dict[str, type[UpdateRule]]] = {}
    lr: float = 1e-3
    weight_decay: float = 0.0

    def __init_subclass__(cls) -> None:
        UpdateRule.known[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise RuleError(f"{type(self).__name__}: {name} must be >= 0, got {getattr(self, name)}")

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the fp32 state arrays that a parameter needs, each of its size."""

    @abstractmethod
    def update(self, param: Floats, grad: Floats, state: Mapping[str, Floats], step: int) -> None:
        """Update one chunk in place.

        Args:
            param: fp32 chunk of the parameter.
            grad: fp32 chunk of ``ĝ``; may be overwritten.
            state: fp32 chunks by slot.
            step: Counted from 1.
        """


@dataclass(frozen=True)
class SGD(UpdateRule):
    """``g ← ĝ + wd·θ;  m ← momentum·m + g;  θ ← θ − lr·m``. To the bit::

    if wd:        t = θ · wd;  g = g + t
    if momentum:  m = m · momentum;  m = m + g;  g = m
                  t = g · lr;  θ = θ − t
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise RuleError(f"SGD: momentum must be in [0, 1), got {self.momentum}")

    @property
    def slots(self) -> tuple[str, ...]:
        """The momentum, if there is any."""
        return ("momentum_buffer",) if self.momentum else ()

    def update(self, param: Floats, grad: Floats, state: Mapping[str, Floats], step: int) -> None:
        """As above."""
        if self.weight_decay:
            grad += param * f32(self.weight_decay)
        if self.momentum:
            mean = state["momentum_buffer"]
            mean *= f32(self.momentum)
            mean += grad
            grad = mean
        param -= grad * f32(self.lr)


@dataclass(frozen=True)
class AdamW(UpdateRule):
    """``m ← β₁m + (1−β₁)ĝ;  s ← β₂s + (1−β₂)ĝ²;  θ ← θ(1 − lr·wd) − lr·m̂/(√ŝ + ε)``. At step k, to the bit::

        θ = θ · fp32(1 − lr·wd)
        m = m · β₁;     t = g · fp32(1 − β₁);                m = m + t
        s = s · β₂;     t = g · g;  t = t · fp32(1 − β₂);    s = s + t
        r = fp32(sqrt(fp64(s)));  r = r / fp32(sqrt(1 − β₂^k));  r = r + ε
        t = m · fp32(lr / (1 − β₁^k));  t = t / r;  θ = θ − t

    The root of an fp32 number through fp64 is the correctly rounded one, which IEEE 754 asks of fp32 itself, and numpy
    gives: 53 bits are more than 2·24 + 1.
    """

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RuleError(f"AdamW: betas must be in [0, 1), got {self.betas}")

    @property
    def slots(self) -> tuple[str, ...]:
        """Mean and mean square."""
        return ("exp_avg", "exp_avg_sq")

    def update(self, param: Floats, grad: Floats, state: Mapping[str, Floats], step: int) -> None:
        """As above."""
        beta1, beta2 = self.betas
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        param *= f32(1 - self.lr * self.weight_decay)
        moved = grad * f32(1 - beta1)
        mean *= f32(beta1)
        mean += moved
        grad *= grad
        grad *= f32(1 - beta2)
        square *= f32(beta2)
        square += grad
        root = np.sqrt(square, out=grad)
        root /= f32((1 - beta2**step) ** 0.5)
        root += f32(self.eps)
        np.multiply(mean, f32(self.lr / (1 - beta1**step)), out=moved)
        moved /= root
        param -= moved


def rule_of(description: Mapping[str, Any], what: str = "the rule") -> UpdateRule:
    """The rule that a message names, with its settings of that round.

    Args:
        description: ``name`` and the hyper-parameters.
        what: The message, for the error.

    Raises:
        RuleError: An unknown name, or settings that the rule does not take.
    """
    name = description.get("name")
    cls = UpdateRule.known.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RuleError(f"{what} is {name!r:.80}, a client without PyTorch knows {', '.join(UpdateRule.known)}: "
                        "let the server take one of them, or the client be one with PyTorch")  # fmt: skip
    settings: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.items() if k != "name"
    }
    expected = {field.name: field.default for field in fields(cls)}
    if settings.keys() != expected.keys():
        raise RuleError(f"{what} has the settings {sorted(settings)} of {name}, not {sorted(expected)}")
    for k, value in settings.items():
        if not _alike(value, expected[k]):
            raise RuleError(f"{what} has {k} = {value!r:.80}; {name} needs one like {expected[k]!r}")
    return cls(**settings)


def _alike(value: object, own: object) -> bool:
    """Numbers, finite, or as many of them."""
    if isinstance(own, tuple):
        return isinstance(value, tuple) and len(value) == len(own) and all(map(_alike, value, own))
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
