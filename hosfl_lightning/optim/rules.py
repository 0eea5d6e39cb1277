"""Elementwise update rules, on one chunk, with no gradient of full size: the same bits on every engine.

Every operation on elements is one fp32 operation, rounded before the next; scalars are computed in fp64 and rounded to
fp32 once; the square root goes through fp64. So there is nothing that an engine could contract to a fused multiply-add,
and torch on any CPU or GPU, numpy, or another engine move θ to the same bits (`wire.RULES`). `torch.optim`
contracts, and its square root is not correctly rounded: it differs from these rules by rounding.

The steps, line by line, are in the docstring of each rule; golden vectors: ``tests/optim/golden_rules.json``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.parts import PartError, by_name, check_part


@dataclass(frozen=True)
class UpdateRule(ABC):
    """``θ ← rule(θ, ĝ, state)``, elementwise, so that any chunking gives the same bits.

    Args:
        lr: Learning rate, > 0 (or 0 to stand still). A scheduler on the optimizer changes it from step to step.
        weight_decay: As in the torch optimizer of the same name.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must be >= 0, got {getattr(self, name)}")

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the fp32 state tensors that a parameter of this group needs, each of its size."""
        return ()

    @abstractmethod
    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]) -> None:
        """Update one chunk in place.

        Args:
            param: fp32 chunk of the parameter.
            grad: fp32 chunk of ``ĝ``; may be overwritten.
            state: fp32 chunks by slot.
            step: Counted from 1.
            group: Hyper-parameters of this step (``lr`` may come from a scheduler).
        """

    def hyper_parameters(self) -> dict[str, Any]:
        """The rule's settings as a ``param_groups`` entry."""
        return asdict(self)


@dataclass(frozen=True)
class SGD(UpdateRule):
    """``g ← ĝ + wd·θ;  m ← momentum·m + g;  θ ← θ − lr·m``, ``torch.optim.SGD`` up to rounding.

    Without momentum the rule keeps no state: the client holds its parameters and nothing else. To the bit::

        if wd:        t = θ · wd;  g = g + t
        if momentum:  m = m · momentum;  m = m + g;  g = m
                      t = g · lr;  θ = θ − t
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"SGD: momentum must be in [0, 1), got {self.momentum}")

    @override
    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    @override
    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            grad.add_(param * group["weight_decay"])
        if group["momentum"]:
            # The buffer starts at zero, so the first step gives 0·momentum + g = g, as torch's first clone does.
            grad = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        param.sub_(grad * group["lr"])


@dataclass(frozen=True)
class AdamW(UpdateRule):
    """``m ← β₁m + (1−β₁)ĝ;  s ← β₂s + (1−β₂)ĝ²;  θ ← θ(1 − lr·wd) − lr·m̂/(√ŝ + ε)``, ``torch.optim.AdamW`` to rounding.

    Keeps two fp32 tensors a parameter; the memory report counts them. At step k, to the bit::

        θ = θ · fp32(1 − lr·wd)
        m = m · β₁;     t = g · fp32(1 − β₁);                m = m + t
        s = s · β₂;     t = g · g;  t = t · fp32(1 − β₂);    s = s + t
        r = fp32(sqrt(fp64(s)));  r = r / fp32(sqrt(1 − β₂^k));  r = r + ε
        t = m · fp32(lr / (1 − β₁^k));  t = t / r;  θ = θ − t
    """

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"AdamW: betas must be in [0, 1), got {self.betas}")

    @override
    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @override
    def update_(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        param.mul_(1 - group["lr"] * group["weight_decay"])
        term = grad * (1 - beta1)
        mean = state["exp_avg"].mul_(beta1).add_(term)
        square = state["exp_avg_sq"].mul_(beta2).add_(grad.mul_(grad).mul_(1 - beta2))
        # A scalar on the device: by one on the host CUDA would multiply by the reciprocal.
        scale = torch.full((), (1 - beta2**step) ** 0.5, dtype=torch.float32, device=param.device)
        denominator = _sqrt(square, out=grad).div_(scale).add_(group["eps"])
        param.sub_(torch.mul(mean, group["lr"] / (1 - beta1**step), out=term).div_(denominator))


def _sqrt(x: Tensor, out: Tensor) -> Tensor:
    """``fp32(sqrt(fp64(x)))``, which is the square root rounded once: numpy's, not torch's on a CPU (MKL)."""
    if x.device.type == "cpu":
        np.sqrt(x.numpy(), out=out.numpy())
        return out
    return out.copy_(x.double().sqrt_())


def check_rule(rule: Any, setting: str) -> None:
    """Refuse what is no update rule, or does something else to a chunk of zeros than to update it in place.

    Raises:
        PartError: Names the class and the contract.
    """
    check_part(rule, UpdateRule, setting)
    if type(rule) in (SGD, AdamW):
        return
    what = f"{setting}: {type(rule).__name__}"
    group = rule.hyper_parameters()
    if not all(isinstance(group.get(name), int | float) for name in ("lr", "weight_decay")):
        raise PartError(f"{what}.hyper_parameters must have the numbers lr and weight_decay, got {group!r:.120}")
    slots = rule.slots(group)
    if not isinstance(slots, tuple | list) or not all(isinstance(slot, str) for slot in slots):
        raise PartError(f"{what}.slots must return the names of its state tensors, a tuple of str, got {slots!r:.80}")
    param, state = torch.zeros(3), {slot: torch.zeros(3) for slot in slots}
    chunk, held = param[:2], {slot: one[:2] for slot, one in state.items()}
    for step in (1, 2, 3):
        returned = rule.update_(chunk, torch.full((2,), 0.5), dict(held), step, dict(group))
        if returned is not None:
            raise PartError(f"{what}.update_ must change its chunk in place and return nothing, got {type(returned)}")
    if group["lr"] and not chunk.any():
        raise PartError(f"{what}.update_ left its chunk as it was; it must change param in place (param.add_(...))")
    if param[2] or not torch.stack([param, *state.values()]).isfinite().all():
        raise PartError(f"{what}.update_ must be elementwise and finite; of zeros it made {chunk.tolist()}")


def rule_of(description: Mapping[str, Any]) -> UpdateRule:
    """The rule of a `ZerothOrder.prescription`: of this package, or of a class that was imported before.

    Raises:
        ValueError: An unknown name, or settings that the rule does not take.
    """
    return by_name(UpdateRule, "update rule", description)
