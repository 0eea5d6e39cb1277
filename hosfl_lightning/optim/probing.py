"""Layer-wise probes: ``θ + μ u`` and ``θ + ε u`` exist for one leaf module at a time, while its forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hosfl_lightning.optim.basis import CHUNK
from hosfl_lightning.rng import DirectionBatch, Domain, Stream, add_direction_, direction_rows

SHARED = {Domain.RADEMACHER: 1 << 18, Domain.GAUSS16: 1 << 16}
"""Largest tensor that is drawn together with others; its packed words, at most 128 KiB, are kept during the probe."""

Owned = list[tuple[int, nn.Parameter]]
"""Perturbed tensors with their number in the directions."""
Saved = dict[int, tuple[Tensor | None, Tensor]]
"""Rows (None: all) and bits of the tensors that are perturbed now."""


@contextmanager
def perturbed_layerwise(
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    stream: Stream,
    scale: Tensor,
    only: Set[int] | None = None,
) -> Iterator[None]:
    r"""While open, every forward through ``module`` sees ``θ' = cast(fp32(θ) + μ u)``; then θ has its saved bits again.

    A pre-hook saves and perturbs the parameters of one submodule, its post-hook copies the saved bits back, so the
    extra memory is the largest leaf, not the model. Token embeddings perturb only the rows that are looked up.
    Restoring by subtraction would drift (3 % relative in bf16 after 100 cycles); copying does not.

    Args:
        module: The module whose forward the objective runs. A submodule's own parameters must be used in its own
            forward, and that called as a module: a tensor that is read elsewhere is read unperturbed.
        parameters: The perturbed tensors; their position is the ``tensor`` of the direction.
        stream: Which direction ``u``.
        scale: 0-d fp32 tensor ``±μ``, rounded for the distribution.
        only: Numbers of the tensors that move; None: all.
    """
    probe = _Probe(parameters, stream, scale)
    saved: Saved = {}
    layers, handles = [], []
    for leaf, owned in _readers(module, parameters, only):
        layer = (_Rows if _looks_up_rows(leaf) else _Layer)(owned, probe, saved)
        layers.append(layer)
        handles.append(leaf.register_forward_pre_hook(layer.perturb, with_kwargs=True))
        handles.append(leaf.register_forward_hook(layer.restore))
    with _fresh_autocast():
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            # Torch calls no hook after an exception.
            for layer in layers:
                while layer.calls:
                    layer.restore()


@contextmanager
def perturbed_in_place(parameters: Sequence[nn.Parameter], stream: Stream, scale: Tensor) -> Iterator[None]:
    """The same for an objective whose modules are unknown: all tensors at once, beside a full copy of their bits."""
    everything = _Layer(list(enumerate(parameters)), _Probe(parameters, stream, scale), {})
    with _fresh_autocast():
        try:
            everything.perturb()
            yield
        finally:
            everything.restore()


@contextmanager
def dual_layerwise(
    module: nn.Module, parameters: Sequence[nn.Parameter], stream: Stream, only: Set[int] | None = None
) -> Iterator[None]:
    r"""While open, every forward through ``module`` sees the dual numbers ``θ + ε u``; then its parameters again.

    The tangent ``u`` of one submodule lives while that submodule runs, and of an embedding only the rows looked up.

    Args:
        module: As in `perturbed_layerwise`; inside a level of `torch.autograd.forward_ad`.
        parameters: As there.
        stream: As there.
        only: As there.
    """
    layers, handles = [], []
    for leaf, owned in _readers(module, parameters, only):
        layer = (_DualRows if _looks_up_rows(leaf) else _DualLayer)(leaf, owned, stream)
        layers.append(layer)
        handles.append(leaf.register_forward_pre_hook(layer.enter))
        handles.append(leaf.register_forward_hook(layer.leave))
    with _fresh_autocast():
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer.restore()


@contextmanager
def _fresh_autocast() -> Iterator[None]:
    """Autocast keeps its casts of parameters until its outermost context ends: none may pass between θ and θ'."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class _Probe:
    """``θ ← cast(fp32(θ) + μ u)`` for one tensor at a time.

    Small tensors share one generator call; what is kept of it is packed bits, not fp32 directions.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], stream: Stream, scale: Tensor) -> None:
        self.stream, self.scale = stream, scale
        small = [(tensor, p.numel()) for tensor, p in enumerate(parameters) if p.numel() <= SHARED[stream.domain]]
        self.position = {tensor: position for position, (tensor, _) in enumerate(small)}
        self.batch = DirectionBatch(stream, small, device=parameters[0].device)

    def add_(self, parameter: nn.Parameter, tensor: int) -> None:
        flat = parameter.detach().view(-1)
        if tensor in self.position:
            wide = flat.float()
            self.batch.add_(self.position[tensor], wide, self.scale)
            flat.copy_(wide)
            return
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            wide = part.float()
            add_direction_(wide, self.scale, self.stream, tensor, start)
            part.copy_(wide)


class _Layer:
    """Perturb one submodule's parameters before its forward, copy the saved bits back after it.

    Args:
        owned: What this submodule perturbs.
        probe: How.
        saved: Shared by all submodules: a forward inside a forward (a recursion, a tensor shared with a child) neither
            perturbs a tensor twice nor restores it too early.
    """

    def __init__(self, owned: Owned, probe: _Probe, saved: Saved) -> None:
        self.owned, self.probe, self.saved = owned, probe, saved
        self.calls: list[Owned] = []

    @torch.no_grad()
    def perturb(self, *call: Any) -> None:
        self.calls.append([])
        for tensor, parameter in self.owned:
            if tensor not in self.saved:
                self._perturb_one(tensor, parameter, *call)

    def _perturb_one(self, tensor: int, parameter: nn.Parameter, *call: Any) -> None:
        self._save(tensor, parameter, None, parameter.detach().clone())
        self.probe.add_(parameter, tensor)

    def _save(self, tensor: int, parameter: nn.Parameter, rows: Tensor | None, bits: Tensor) -> None:
        self.saved[tensor] = rows, bits
        self.calls[-1].append((tensor, parameter))

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        for tensor, parameter in self.calls.pop() if self.calls else []:
            rows, bits = self.saved.pop(tensor)
            _write(parameter, rows, bits)


class _Rows(_Layer):
    """An embedding's looked-up rows only. Repeated tokens write the same bits, so rows need not be unique."""

    def _perturb_one(self, tensor: int, parameter: nn.Parameter, *call: Any) -> None:
        _, args, kwargs = call
        rows = (args[0] if args else kwargs["input"]).reshape(-1).long()
        if len(rows) >= len(parameter):
            super()._perturb_one(tensor, parameter)
            return
        bits = parameter.detach().index_select(0, rows)  # a fifth of the time of indexing
        u = direction_rows(self.probe.stream, tensor, rows, parameter.shape[1])
        self._save(tensor, parameter, rows, bits)
        _write(parameter, rows, torch.addcmul(bits.float(), u, self.probe.scale).to(parameter.dtype))


class _DualLayer:
    """Put dual numbers in the place of one submodule's parameters while its forward runs.

    Args:
        leaf: The submodule.
        owned: Which of its parameters, by number in the directions.
        stream: Which direction ``u``.
    """

    def __init__(self, leaf: nn.Module, owned: Owned, stream: Stream) -> None:
        self.leaf, self.owned, self.stream = leaf, owned, stream
        self.depth = 0
        numbers = {id(p): tensor for tensor, p in owned}
        self.slots = [
            (holder, name, p, numbers[id(p)])
            for holder in leaf.modules()
            for name, p in holder._parameters.items()
            if p is not None and id(p) in numbers
        ]

    def enter(self, *_: Any) -> None:
        self.depth += 1
        if self.depth > 1:  # a forward inside a forward
            return
        for holder, name, parameter, tensor in self.slots:
            u = torch.zeros(parameter.numel(), device=parameter.device)
            for start in range(0, u.numel(), CHUNK):
                add_direction_(u[start : start + CHUNK], 1.0, self.stream, tensor, start)
            dual = forward_ad.make_dual(parameter.detach(), u.view_as(parameter).to(parameter.dtype))
            holder._parameters[name] = dual  # type: ignore[assignment]

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        self.depth -= 1
        if not self.depth:
            self.restore()
        return output

    def restore(self) -> None:
        self.depth = 0
        for holder, name, parameter, _ in self.slots:
            holder._parameters[name] = parameter


class _DualRows(_DualLayer):
    """An embedding: the tangent of its output are the looked-up rows of ``u``."""

    def enter(self, *_: Any) -> None: ...

    def leave(self, _module: nn.Module, args: Any, output: Any) -> Any:
        ((_, _, parameter, tensor),) = self.slots
        u = direction_rows(self.stream, tensor, args[0].reshape(-1).long(), parameter.shape[1])
        return forward_ad.make_dual(output, u.view_as(output).to(output.dtype))


def _write(parameter: nn.Parameter, rows: Tensor | None, bits: Tensor) -> None:
    if rows is None:
        parameter.copy_(bits)
    else:
        parameter.index_copy_(0, rows, bits)


def _looks_up_rows(leaf: nn.Module) -> bool:
    # A subclass with a forward of its own may compute other indices (OPT's positions) or use the whole weight.
    return isinstance(leaf, nn.Embedding) and type(leaf).forward is nn.Embedding.forward and leaf.max_norm is None


def _readers(
    module: nn.Module, parameters: Sequence[nn.Parameter], only: Set[int] | None
) -> Iterator[tuple[nn.Module, Owned]]:
    """The submodules that read some of ``parameters`` in their own forward, with which."""
    index = {id(p): i for i, p in enumerate(parameters) if only is None or i in only}
    for leaf in module.modules():
        owned = [(index[id(p)], p) for p in _read_by(leaf) if id(p) in index]
        if owned:
            yield leaf, owned


def _read_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """What the forward of ``module`` reads itself: its own parameters and those of children that nobody calls."""
    yield from module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    for child in module.children():
        if type(child).forward is nn.Module.forward:  # a ParameterList or ParameterDict
            yield from _read_by(child)
