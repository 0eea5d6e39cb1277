"""What every client of a split round computes, whatever its order of optimization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hosfl_lightning.aggregation import apply_update
from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.clients.lagrangian import lagrangian_term
from hosfl_lightning.optim import Basis, ZerothOrder
from hosfl_lightning.split import run
from hosfl_lightning.wire import Update


@dataclass(eq=False, repr=False)
class Anchor:
    """What a client keeps between its forward and λ.

    Args:
        z: Smashed data ``(B, S, h)`` at θ, in compute dtype, without a graph; gone after `release`.
        graphs: A first-order client's smashed data with their graphs, one a client; empty for forward-only ones.
        kept: What else is held, a module and its input each: the taps of a side adapter that are not computed again.
    """

    z: Tensor
    graphs: Sequence[Tensor] = ()
    kept: Sequence[tuple[Any, Tensor]] = ()
    _base: Tensor | None = field(default=None, init=False)

    def release(self, multiplier: Tensor, rows: list[slice]) -> Tensor:
        """``⟨λ_k, z_k⟩``, ``(K,)`` fp64: all that a probe needs of z, which is dropped; the same when called again.

        Args:
            multiplier: ``λ (B, S, h)``.
            rows: Each client's examples.
        """
        if self._base is None:
            self._base = lagrangian_term(self.z, multiplier, rows)
            del self.z
        return self._base

    def part(self, numbers: slice, rows: slice) -> Anchor:
        """One client's of it, after `release`: which of the rows that were given there, and its examples."""
        assert self._base is not None
        one = copy(self)
        one._base = self._base[numbers]
        one.graphs = self.graphs[numbers]
        one.kept = [(module, given[rows]) for module, given in self.kept]
        return one


class Client:
    """What a client holds of the model, and the rule that moves what it trains.

    Args:
        half: A module with ``inputs``, the names of what it takes of a batch; put into eval mode, so dropout and norm
            statistics are the same at every evaluation.
        optimizer: Holds the trained parameters in manifest order and applies coefficients.
    """

    def __init__(self, half: nn.Module, optimizer: ZerothOrder) -> None:
        self.half = half.eval()
        self.optimizer = optimizer

    def evaluate(self, batch: Batch) -> Tensor:
        """The output of what it holds.

        Raises:
            RuntimeError: Somebody has put it into train mode.
        """
        if self.half.training:
            raise RuntimeError(
                "the client half is in train mode, so its dropout would differ between probes; call eval()"
            )
        return run(self.half, batch)

    def apply(self, update: Update) -> None:
        """Step 6: ``θ_c ← rule(θ_c, ĝ)``, as a client that was away does it from the log."""
        apply_update(update, self.optimizer)


class SplitClient(Client, ABC):
    """The lower half ``f_c(x; θ_c)``: smashed data up, λ down, coefficients up."""

    @abstractmethod
    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """Step 2: smashed data, and what must be kept until λ comes.

        Args:
            batch: What the half takes, on the client's device.
            rows: Each client's examples.
        """

    @abstractmethod
    def answer(self, batch: Batch, anchor: Anchor, multiplier: Tensor, rows: list[slice], basis: Basis) -> Tensor:
        """Step 4: coefficients of each client's gradient of ``⟨λ_k, f_c(x_k; θ_c)⟩``, ``(K, basis.size)``.

        Args:
            batch: As given to `forward`.
            anchor: As returned by `forward`.
            multiplier: ``λ (B, S, h)``, each client's unweighted, zero at padding.
            rows: Each client's examples.
            basis: In what the answer is expressed.
        """


def freeze(half: nn.Module) -> None:
    """No tensor of the half asks for a graph."""
    for parameter in half.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
