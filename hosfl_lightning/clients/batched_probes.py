"""How many probes a client evaluates at once, within the memory that it promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from hosfl_lightning.clients.cohort import Batch
from hosfl_lightning.memory import MemoryMeter, storage_bytes
from hosfl_lightning.optim import SharedDirections, ZerothOrder
from hosfl_lightning.optim.compiled import compiled_around
from hosfl_lightning.optim.probe_batch import Call, Point, ProbeBatch, estimated, points_of

Size = int | Literal["auto"]
SHARE = 1 / 8
"""Of the plain forward's peak, parameters included: what ``auto`` may add to it."""


class ProbeBatchError(ValueError):
    """So many probes cannot run at once; the message names the setting."""


@dataclass(frozen=True)
class Plain:
    """What a plain forward on a batch of some shapes has shown: n for such a batch, and the calls of its leaves."""

    at_once: int
    calls: list[Call]


class BatchedProbes:
    r"""``⟨λ_k, f_c(x_k; θ_c + s_i u_i)⟩`` for n points by one forward (`ProbeBatch`), n by the shapes alone.

    ::

        n (A + T) ≤ A + (C + A) / 8      A: activations of a plain forward and its batch, T: what is probed, C: the half

    is ``auto``: an answer stays within inference memory, z, and an eighth. A is that of a forward on ones of the shapes
    of the batch, run when they first come; neither the data, nor time or free memory are asked, so that the same run
    has the same bits wherever it runs. What cannot be batched runs one by one.

    Args:
        half: ``f_c``, in eval mode.
        optimizer: Over θ_c with ``module=half``.
        size: ``auto``, or n; 1: one by one.

    Raises:
        ProbeBatchError: Another size, or several in a compiled half.
    """

    def __init__(self, half: nn.Module, optimizer: ZerothOrder, size: Size) -> None:
        check_size(size)
        self.half, self.optimizer, self.size = half, optimizer, size
        self.plain: dict[tuple[torch.Size, ...], Plain] = {}
        ours = {id(p) for p in optimizer.parameters}
        compiled = compiled_around(half, [name for name, p in half.named_parameters() if id(p) in ours]) is not None
        if compiled and size not in (1, "auto"):
            raise ProbeBatchError(f"probe_batch={size}: a compiled {type(half).__name__} is one graph, in which no "
                                  "layer can run in another way; set it to 1, or compile nothing")  # fmt: skip
        #: Whether nothing can be batched here.
        self.refused = compiled or size == 1 or not points_of(optimizer, optimizer.basis(0))

    @cached_property
    def batch(self) -> ProbeBatch:
        """What runs them."""
        return ProbeBatch(self.optimizer)

    def project(
        self,
        evaluate: Callable[[Batch], Tensor],
        term: Callable[[Tensor], Tensor],
        batch: Batch,
        basis: SharedDirections,
        base: Tensor,
    ) -> Tensor | None:
        """As `ZerothOrder.project`; None: they have to run one by one.

        Args:
            evaluate: ``f_c`` of a batch.
            term: ``⟨λ_k, z_k⟩`` of its output, ``(K,)`` fp64.
            batch: The batch.
            basis: The directions.
            base: The terms at θ_c.

        Raises:
            ProbeBatchError: ``size`` is a number, and they cannot run at once.
        """
        points = points_of(self.optimizer, basis)
        if self.refused or len(points) == 1:
            return None
        names: Any = self.half.inputs
        taken = {name: batch[name] for name in names}
        try:
            values = self._values(evaluate, term, taken, basis, points)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.size != "auto":
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ProbeBatchError(f"probe_batch={self.size}: the probes of a {type(self.half).__name__} cannot run "
                                      f"in one forward ({why}); set probe_batch: 1") from error  # fmt: skip
            self.plain[shapes_of(taken)] = Plain(1, [])  # these alone: what came before must not decide on others
            return None
        return estimated(self.optimizer, basis, values, base) if values else None

    def _values(
        self,
        evaluate: Callable[[Batch], Tensor],
        term: Callable[[Tensor], Tensor],
        taken: Batch,
        basis: SharedDirections,
        points: list[Point],
    ) -> dict[Point, Tensor]:
        """By point; nothing where one by one is all that the memory bears."""
        plain = self._plain(evaluate, taken)
        width = -(-len(points) // -(-len(points) // plain.at_once))  # groups of one size, or nearly
        values: dict[Point, Tensor] = {}
        for first in range(0, len(points) if width > 1 else 0, width):
            some = points[first : first + width]
            values |= zip(some, map(term, self.batch(evaluate, taken, plain.calls, basis, some)))
        return values

    def _plain(self, evaluate: Callable[[Batch], Tensor], taken: Batch) -> Plain:
        """What is known of a batch of such shapes; who counts what a round costs does not see how it is found out."""
        shapes = shapes_of(taken)
        if shapes not in self.plain:
            ones = {name: torch.ones_like(tensor) for name, tensor in taken.items()}
            device = self.optimizer.device
            with _disable_current_modes(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                before = self._random_state()
                with self.batch.noting() as calls, MemoryMeter() as meter, meter.role("forward"):
                    evaluate(ones)
                if not torch.equal(before, self._random_state()):
                    calls = []  # each copy would draw its own numbers
            nbytes = meter.peak("forward") + storage_bytes(ones.values())
            self.plain[shapes] = Plain(self._at_once(nbytes) if self.size == "auto" else self.size, calls)
        return self.plain[shapes]

    def _at_once(self, nbytes: int) -> int:
        """n of a batch whose plain forward takes so many bytes."""
        held = storage_bytes([*self.half.parameters(), *self.half.buffers()])
        return max(1, int((nbytes + SHARE * (held + nbytes)) // (nbytes + self.batch.nbytes)))

    def _random_state(self) -> Tensor:
        device = self.optimizer.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def shapes_of(taken: Batch) -> tuple[torch.Size, ...]:
    """Of what the half takes of a batch."""
    return tuple(tensor.shape for tensor in taken.values())


def check_size(size: object) -> None:
    """Refuse what is no number of probes.

    Raises:
        ProbeBatchError: Names the setting.
    """
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ProbeBatchError(f"probe_batch must be auto, or a number of probes from 1 on, got {size!r}")
