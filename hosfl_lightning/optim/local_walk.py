"""Local steps along directions that all clients share: a client's walk is as many scalars as it has probes."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from hosfl_lightning.optim.basis import SharedDirections
from hosfl_lightning.optim.rules import SGD, UpdateRule
from hosfl_lightning.optim.zeroth_order import ZerothOrder


class LocalWalk:
    r"""``θ_{s+1} = θ_s − lr (1/P) Σ_p v_sp u_sp``, ``s = 0 .. E − 1``; θ has its saved bits again when the walk closes.

    The steps add up to one step of plain SGD along all ``E · P`` directions, which a later update record applies::

        θ_E = θ_0 − lr (1/EP) Σ_sp c_sp u_sp,   c_sp = E v_sp

    This is linear in ``c``: the weighted mean of the clients' ``θ_E`` is the walk along the weighted mean of their
    ``c``. What is kept of the start is a copy of the trained tensors.

    Example::

        with LocalWalk(optimizer, basis, steps=E) as walk:
            for s in range(E):
                walk.move(s, optimizer.project(objective, basis=walk.directions(s)))
        answer = walk.coefficients

    Args:
        optimizer: Whose parameters walk; of plain SGD, see `check_linear`.
        basis: The directions of the whole round, ``E · P`` of them.
        steps: ``E``.
    """

    def __init__(self, optimizer: ZerothOrder, basis: SharedDirections, steps: int) -> None:
        self.optimizer, self.basis, self.steps = optimizer, basis, steps
        self.probes = basis.size // steps
        self.coefficients = torch.zeros(basis.size)
        self._start: list[Tensor] = []

    def directions(self, step: int) -> SharedDirections:
        """``u_s1 .. u_sP``."""
        return self.basis.part(step * self.probes, self.probes)

    def move(self, step: int, values: Tensor) -> None:
        """``θ ← θ − lr (1/P) Σ_p v_sp u_sp`` for ``values (P,)``; a step that is left out has coefficients 0."""
        first = step * self.probes
        self.coefficients[first : first + self.probes] = self.steps * values.float().cpu()
        if step < self.steps - 1:  # nobody looks at where the last one leads
            self.optimizer.record(values, self.directions(step))
            self.optimizer.step()

    def __enter__(self) -> LocalWalk:
        if self.steps > 1:
            self._start = [p.detach().clone() for p in self.optimizer.parameters]
        self._taken = [group["step"] for group in self.optimizer.param_groups]
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter, bits in zip(self.optimizer.parameters, self._start):
            parameter.copy_(bits)
        for group, taken in zip(self.optimizer.param_groups, self._taken):
            group["step"] = taken
        self._start = []
        torch.clear_autocast_cache()


def check_linear(rule: UpdateRule, who: str) -> None:
    """Refuse a rule under which the mean of the clients' walks is not the walk along the mean of their scalars.

    Args:
        rule: The clients'.
        who: The method and the setting that ask for it, as ``ZOFL with local_steps=5``.

    Raises:
        ValueError: Names the setting and the fix.
    """
    if not isinstance(rule, SGD) or rule.momentum or rule.weight_decay:
        raise ValueError(
            f"trainer.algorithm: {who} averages scalars in the place of walks, which is the same for plain SGD only; "
            f"set client_optimizer to hosfl_lightning.optim.SGD without momentum and weight_decay, got {rule}"
        )
