"""What every client does in a round, whatever its order of optimization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.aggregation import apply_update
from hosfl_lightning.optim import Basis, ZerothOrder
from hosfl_lightning.padding import FILL, drop_unpredictable, stack_rows
from hosfl_lightning.wire import Update

Batch = dict[str, Tensor]

#: Elements, and parts of z, that the Lagrangian term widens to fp64 at a time: scratch of 1 MiB or an eighth of fp32 z.
WIDENED, PARTS = 1 << 16, 32


@dataclass(frozen=True)
class Cohort:
    """Clients whose batches run as one: all of a round (batched), or a single one (per client).

    Args:
        clients: Their ids, ascending.
        batch: Inputs, ``attention_mask`` over z's positions and ``labels`` of all, one after the other, on the host.
        rows: Each client's examples in the batch.
        widths: ``S_k``, the length of each client's own batch; the joint one is padded to the longest.
        num_terms: ``n_k``, each client's number of loss terms.
    """

    clients: list[int]
    batch: Batch
    rows: list[slice]
    widths: list[int]
    num_terms: list[int]

    @classmethod
    def join(cls, clients: list[int], batches: Sequence[Batch], count: Callable[[Tensor], int]) -> Cohort:
        """The clients' minibatches below each other; ``count`` gives the loss terms of one client's labels."""
        batches = [{**b, "labels": drop_unpredictable(b["labels"], b["attention_mask"])} for b in batches]
        sizes = [len(b["labels"]) for b in batches]
        ends = list(accumulate(sizes))
        return cls(
            clients=clients,
            batch={name: stack_rows([b[name] for b in batches], FILL.get(name, 0)) for name in batches[0]},
            rows=[slice(end - size, end) for end, size in zip(ends, sizes)],
            widths=[b["attention_mask"].shape[1] for b in batches],
            num_terms=[count(b["labels"]) for b in batches],
        )


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


def run(half: nn.Module, batch: Batch) -> Tensor:
    """The half on what it takes of a batch."""
    names: Any = half.inputs
    return half(*(batch[name] for name in names))


def freeze(half: nn.Module) -> None:
    """No tensor of the half asks for a graph."""
    for parameter in half.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def lagrangian_term(z: Tensor, multiplier: Tensor, rows: list[slice]) -> Tensor:
    r"""``⟨λ_k, z_k⟩`` for every client, ``(K,)`` fp64.

    A product of two floats of at most 24 significant bits is exact in fp64. So a probe may take the difference of two
    such sums, ``⟨λ, z_p⟩ − ⟨λ, z⟩``: it errs by about ``1e-16 Σ|λ z|``, a millionth of what z's own rounding does to it
    in fp32, and z need not be kept. The difference of two sums in z's precision is lost in their rounding.

    Features are summed first, then positions, then examples, so the order does not depend on threads.

    Args:
        z: ``f_c(x; θ')``, ``(B, S, h)``, fp32 or narrower.
        multiplier: λ, likewise.
        rows: Each client's examples.

    Reference: HO-SFL, arXiv 2603.14773, the Lagrangian's client term.
    """
    examples, positions, features = z.shape
    width = max(1, WIDENED // (examples * features), positions // PARTS)
    parts = zip(z.split(width, dim=1), multiplier.split(width, dim=1))
    tokens = torch.cat([part.double().mul_(factor).sum(-1) for part, factor in parts], dim=1)
    totals = tokens.sum(-1)
    return torch.stack([totals[r].sum() for r in rows])
