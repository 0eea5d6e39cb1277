"""Layer-wise probes: ``θ + μ u`` exists for one leaf module at a time, while its forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.optim.basis import CHUNK, SMALL
from hosfl_lightning.rng import DirectionBatch, Stream, add_direction_, direction_rows


@contextmanager
def perturbed_layerwise(
    module: nn.Module, parameters: Sequence[nn.Parameter], stream: Stream, scale: Tensor
) -> Iterator[None]:
    r"""While open, every forward through ``module`` sees ``θ' = cast(fp32(θ) + μ u)``; afterwards θ has its saved bits.

    A pre-hook saves and perturbs the parameters of one submodule, its post-hook copies the saved bits back, so the extra
    memory is the largest leaf, not the model. Token embeddings perturb only the rows that are looked up. Restoring by
    subtraction would drift (3 % relative in bf16 after 100 cycles); copying does not.

    Args:
        module: The module whose forward the objective runs. A submodule's own parameters must be used in its own forward.
        parameters: The perturbed tensors; their position is the ``tensor`` of the direction.
        stream: Which direction ``u``.
        scale: 0-d fp32 tensor ``±μ``, rounded for the distribution.
    """
    index = {id(p): i for i, p in enumerate(parameters)}
    # Small tensors share one generator call; what is kept of it is packed bits, not fp32 directions.
    small = [(i, p.numel()) for i, p in enumerate(parameters) if p.numel() <= SMALL]
    device = parameters[0].device
    batch = DirectionBatch(stream, small, device=device) if small else None
    where = {i: position for position, (i, _) in enumerate(small)}

    def add(parameter: Tensor, tensor: int) -> None:
        if tensor in where:
            assert batch is not None
            _add_in_fp32(parameter, lambda out, _: batch.add_(where[tensor], out, scale))
        else:
            _add_in_fp32(parameter, lambda out, start: add_direction_(out, scale, stream, tensor, start))

    handles = []
    for leaf in module.modules():
        owned = [(p, index[id(p)]) for p in leaf.parameters(recurse=False) if id(p) in index]
        if not owned:
            continue
        hooks = _RowHooks(owned[0], stream, scale) if _looks_up_rows(leaf) else _LeafHooks(owned, add)
        handles.append(leaf.register_forward_pre_hook(hooks.perturb))
        handles.append(leaf.register_forward_hook(hooks.restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def perturbed_in_place(parameters: Sequence[nn.Parameter], stream: Stream, scale: Tensor) -> Iterator[None]:
    """The same for an objective whose modules are unknown: all tensors at once, beside a full copy of their bits."""
    saved = [p.detach().clone() for p in parameters]
    try:
        for tensor, parameter in enumerate(parameters):
            _add_in_fp32(parameter, lambda out, start, t=tensor: add_direction_(out, scale, stream, t, start))
        yield
    finally:
        with torch.no_grad():
            for parameter, bits in zip(parameters, saved):
                parameter.copy_(bits)


class _LeafHooks:
    """Perturb one submodule's own parameters before its forward, copy the saved bits back after it."""

    def __init__(self, owned: list[tuple[nn.Parameter, int]], add: Any) -> None:
        self.owned, self.add = owned, add
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def perturb(self, *_: Any) -> None:
        self.saved = [p.detach().clone() for p, _ in self.owned]
        for parameter, tensor in self.owned:
            self.add(parameter, tensor)

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        for (parameter, _), bits in zip(self.owned, self.saved):
            parameter.copy_(bits)
        self.saved = []


class _RowHooks:
    """An embedding's looked-up rows only. Repeated tokens write the same bits, so no ``unique`` and no host sync."""

    def __init__(self, owned: tuple[nn.Parameter, int], stream: Stream, scale: Tensor) -> None:
        (self.weight, self.tensor), self.stream, self.scale = owned, stream, scale
        self.rows: Tensor | None = None

    @torch.no_grad()
    def perturb(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1)
        self.rows, self.saved = rows, self.weight[rows]
        moved = self.saved.float().addcmul_(
            direction_rows(self.stream, self.tensor, rows, self.weight.shape[1]), self.scale
        )
        self.weight[rows] = moved.to(self.weight.dtype)

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        if self.rows is not None:
            self.weight[self.rows] = self.saved
            self.rows = None


def _looks_up_rows(leaf: nn.Module) -> bool:
    # A subclass with a forward of its own may compute other indices (OPT's positions) or use the whole weight.
    return isinstance(leaf, nn.Embedding) and type(leaf).forward is nn.Embedding.forward and leaf.max_norm is None


@torch.no_grad()
def _add_in_fp32(parameter: Tensor, add: Any) -> None:
    """``θ ← cast(fp32(θ) + …)`` by chunks; in place where θ is contiguous fp32 already."""
    data = parameter.detach()
    flat = data.view(-1) if data.is_contiguous() else data.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        if part.dtype == torch.float32:
            add(part, start)
        else:
            wide = part.float()
            add(wide, start)
            part.copy_(wide)
    if not data.is_contiguous():
        data.copy_(flat.view(data.shape))
