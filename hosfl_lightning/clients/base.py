"""What every client does in a round, whatever its order of optimization."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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
        batch: ``input_ids``, ``attention_mask``, ``labels`` of all, one after the other, on the host.
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
        sizes = [len(b["input_ids"]) for b in batches]
        ends = list(accumulate(sizes))
        return cls(
            clients=clients,
            batch={name: stack_rows([b[name] for b in batches], fill) for name, fill in FILL.items()},
            rows=[slice(end - size, end) for end, size in zip(ends, sizes)],
            widths=[b["input_ids"].shape[1] for b in batches],
            num_terms=[count(b["labels"]) for b in batches],
        )


@dataclass(eq=False, repr=False)
class Anchor:
    """What a client keeps between its forward and λ.

    Args:
        z: Smashed data ``(B, S, h)`` at θ, in compute dtype, without a graph; gone after `release`.
        graphs: A first-order client's smashed data with their graphs, one a client; empty for forward-only ones.
    """

    z: Tensor
    graphs: Sequence[Tensor] = ()
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


class Client(ABC):
    """The lower half ``f_c(x; θ_c)`` and the rule that moves θ_c.

    Args:
        half: ``f_c``; put into eval mode, so dropout and norm statistics are the same at every evaluation.
        optimizer: Holds θ_c in manifest order and applies coefficients.
    """

    def __init__(self, half: nn.Module, optimizer: ZerothOrder) -> None:
        self.half = half.eval()
        self.optimizer = optimizer

    @abstractmethod
    def forward(self, batch: Batch, rows: list[slice]) -> Anchor:
        """Step 2: smashed data, and what must be kept until λ comes.

        Args:
            batch: ``input_ids`` and ``attention_mask``, ``(B, S)``, on the client's device.
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

    def apply(self, update: Update) -> None:
        """Step 6: ``θ_c ← rule(θ_c, ĝ)``, as a client that was away does it from the log."""
        apply_update(update, self.optimizer)

    def _evaluate(self, batch: Batch) -> Tensor:
        if self.half.training:
            raise RuntimeError(
                "the client half is in train mode, so its dropout would differ between probes; call eval()"
            )
        return self.half(batch["input_ids"], batch["attention_mask"])


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
