"""Layer-wise probes: ``θ + μ u`` and ``θ + ε u`` exist for one leaf module at a time, while its forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hosfl_lightning.optim.autocast import fresh_autocast
from hosfl_lightning.optim.basis import CHUNK
from hosfl_lightning.optim.readers import Owned, Readers
from hosfl_lightning.rng import DirectionBatch, Domain, Stream, add_direction_, direction_rows

SHARED = {Domain.RADEMACHER: 1 << 18, Domain.GAUSS16: 1 << 16}
"""Largest tensor that is drawn together with others; its packed words, at most 128 KiB, are kept during the probe."""

Saved = dict[int, tuple[Tensor | None, Tensor]]
"""Rows (None: all) and bits of the tensors that are perturbed now."""


class UnseenProbeError(ValueError):
    """Nothing ran that would have seen a probe."""


@contextmanager
def perturbed_layerwise(module: nn.Module, readers: Readers, stream: Stream, scale: Tensor) -> Iterator[None]:
    r"""While open, every forward through ``module`` sees ``θ' = cast(fp32(θ) + μ u)``; then θ has its saved bits again.

    A pre-hook saves and perturbs the parameters of one submodule, its post-hook copies the saved bits back, so the
    extra memory is the largest leaf, not the model. Token embeddings perturb only the rows that are looked up.
    Restoring by subtraction would drift (3 % relative in bf16 after 100 cycles); copying does not.

    Args:
        module: The module whose forward the objective runs. A submodule's own parameters must be used in its own
            forward, and that called as a module: a tensor that is read elsewhere is read unperturbed.
        readers: Who reads the perturbed tensors in it.
        stream: Which direction ``u``.
        scale: 0-d fp32 tensor ``±μ``, rounded for the distribution.

    Raises:
        UnseenProbeError: While it was open, no submodule with such a tensor was called.
    """
    with _layerwise(module, readers, Displacement(readers.parameters, stream, scale), _Layer, _Rows):
        yield


@contextmanager
def perturbed_in_place(readers: Readers, stream: Stream, scale: Tensor) -> Iterator[None]:
    """The same bits where no hook runs, in a compiled module or an unknown one: all tensors at once, beside a copy."""
    probed = [(i, p) for i, p in enumerate(readers.parameters) if id(p) in readers.index]
    everything = _Layer(probed, Displacement(readers.parameters, stream, scale), {})
    with fresh_autocast():
        try:
            everything.perturb()
            yield
        finally:
            everything.restore()


@contextmanager
def dual_layerwise(module: nn.Module, readers: Readers, stream: Stream) -> Iterator[None]:
    r"""While open, every forward through ``module`` sees the dual numbers ``θ + ε u``; then its parameters again.

    The tangent ``u`` of one submodule lives while that submodule runs, and of an embedding only the rows looked up.

    Args:
        module: As in `perturbed_layerwise`; inside a level of `torch.autograd.forward_ad`.
        readers: As there.
        stream: As there.
    """
    with _layerwise(module, readers, _Duals(module, readers.parameters, stream), _DualLayer, _DualRows):
        yield


@contextmanager
def _layerwise(
    module: nn.Module, readers: Readers, probe: Displacement, whole: type[_Layer], looked_up: type[_Layer]
) -> Iterator[None]:
    saved: Saved = {}
    layers, handles = [], []
    for leaf, owned in readers.of(module):
        layer = (looked_up if _looks_up_rows(leaf) else whole)(owned, probe, saved)
        layers.append(layer)
        handles.append(leaf.register_forward_pre_hook(layer.perturb, with_kwargs=True))
        handles.append(leaf.register_forward_hook(layer.restore))
    with fresh_autocast():
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            # Torch calls no hook after an exception.
            for layer in layers:
                while layer.calls:
                    layer.restore()
    if layers and not any(layer.called for layer in layers):
        raise UnseenProbeError(f"a probe moved nothing: the objective does not call {type(module).__name__}, the "
                               "module whose parameters are probed; call that very module, not a compiled one or a "
                               "copy, or pass module=None")  # fmt: skip


class Displacement:
    """``θ ← cast(fp32(θ) + μ u)`` for one tensor at a time.

    Small tensors share one generator call; what is kept of it is packed bits, not fp32 directions.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], stream: Stream, scale: Tensor) -> None:
        self.stream, self.scale = stream, scale
        small = [(tensor, p.numel()) for tensor, p in enumerate(parameters) if p.numel() <= SHARED[stream.domain]]
        self.position = {tensor: position for position, (tensor, _) in enumerate(small)}
        self.batch = DirectionBatch(stream, small, device=parameters[0].device)

    def add_(self, parameter: Tensor, tensor: int) -> None:
        """Move one, by its number in the directions."""
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


class _Duals(Displacement):
    """``θ + ε u`` in the place of one tensor at a time, wherever ``module`` holds it."""

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], stream: Stream) -> None:
        super().__init__(parameters, stream, torch.ones((), device=parameters[0].device))
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        for holder in module.modules():
            for name, parameter in holder._parameters.items():
                self.places.setdefault(id(parameter), []).append((holder, name))

    def dual(self, parameter: nn.Parameter, tensor: int) -> Tensor:
        u = torch.zeros_like(parameter, dtype=torch.float32)
        self.add_(u, tensor)
        return forward_ad.make_dual(parameter.detach(), u.to(parameter.dtype))

    def put(self, parameter: nn.Parameter, value: Any) -> None:
        for holder, name in self.places[id(parameter)]:
            holder._parameters[name] = value


class _Layer:
    """Perturb one submodule's parameters before its forward, copy the saved bits back after it.

    Args:
        owned: What this submodule perturbs.
        probe: How.
        saved: Shared by all submodules: a forward inside a forward (a recursion, a tensor shared with a child) neither
            perturbs a tensor twice nor restores it too early.
    """

    def __init__(self, owned: Owned, probe: Any, saved: Saved) -> None:
        self.owned, self.probe, self.saved = owned, probe, saved
        self.calls: list[Owned] = []
        self.called = False

    @torch.no_grad()
    def perturb(self, *call: Any) -> None:
        self.called = True
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
    def restore(self, *_: Any) -> Any:
        for tensor, parameter in self.calls.pop() if self.calls else []:
            self._restore_one(parameter, *self.saved.pop(tensor))

    def _restore_one(self, parameter: nn.Parameter, rows: Tensor | None, bits: Tensor) -> None:
        _write(parameter, rows, bits)


class _Rows(_Layer):
    """An embedding's looked-up rows only. Repeated tokens write the same bits, so rows need not be unique."""

    def _perturb_one(self, tensor: int, parameter: nn.Parameter, *call: Any) -> None:
        rows = _rows(*call)
        if len(rows) >= len(parameter):
            super()._perturb_one(tensor, parameter)
            return
        bits = parameter.detach().index_select(0, rows)  # a fifth of the time of indexing
        u = direction_rows(self.probe.stream, tensor, rows, parameter.shape[1])
        self._save(tensor, parameter, rows, bits)
        _write(parameter, rows, torch.addcmul(bits.float(), u, self.probe.scale).to(parameter.dtype))


class _DualLayer(_Layer):
    """Put dual numbers in the place of one submodule's parameters before its forward, the parameters after it."""

    def _perturb_one(self, tensor: int, parameter: nn.Parameter, *call: Any) -> None:
        self._save(tensor, parameter, None, parameter)
        self.probe.put(parameter, self.probe.dual(parameter, tensor))

    def _restore_one(self, parameter: nn.Parameter, rows: Tensor | None, bits: Tensor) -> None:
        self.probe.put(parameter, parameter)


class _DualRows(_DualLayer):
    """An embedding keeps its table; its output gets the looked-up rows of ``u`` as tangent."""

    def _perturb_one(self, tensor: int, parameter: nn.Parameter, *call: Any) -> None:
        self._save(tensor, parameter, _rows(*call), parameter)

    def _restore_one(self, parameter: nn.Parameter, rows: Tensor | None, bits: Tensor) -> None: ...

    def restore(self, *call: Any) -> Any:
        """The output as a dual number, where there is one and it is none yet: an outer call may hold the table."""
        moved = self.calls[-1] if self.calls and call else []
        looked_up = [(tensor, rows) for tensor, _ in moved if (rows := self.saved[tensor][0]) is not None]
        super().restore()
        for tensor, rows in looked_up:
            output = call[-1]
            u = direction_rows(self.probe.stream, tensor, rows, output.shape[-1])
            return forward_ad.make_dual(output, u.view_as(output).to(output.dtype))


def _write(parameter: nn.Parameter, rows: Tensor | None, bits: Tensor) -> None:
    if rows is None:
        parameter.copy_(bits)
    else:
        parameter.index_copy_(0, rows, bits)


def _rows(_embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The rows that a call of an embedding looks up."""
    return (args[0] if args else kwargs["input"]).reshape(-1).long()


def _looks_up_rows(leaf: nn.Module) -> bool:
    # A subclass with a forward of its own may compute other indices (OPT's positions) or use the whole weight.
    return isinstance(leaf, nn.Embedding) and type(leaf).forward is nn.Embedding.forward and leaf.max_norm is None
