"""Side adapters: bottlenecks that lead from the layers below the cut straight to the smashed data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hosfl_lightning.split.cut import check_cut
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.structure import find_layers

#: The attribute of a layer that holds its bottleneck; PEFT saves what has ``lora_`` in its name.
NAME = "lora_side"
ADAPTER = "default"


@dataclass
class Side:
    r"""Ladder side-tuning at the client: ``z = h_cut + Σ_l up_l(GELU(down_l(norm(h_l))))``.

    ``h_l`` are outputs of the client's layers, ``up_l`` is zero at the start, ``norm`` has no weights. Each path to z
    is direct, so λ gives the exact gradient of every ``up_l`` and ``down_l`` without entering the backbone.

    Attributes:
        client: width of each bottleneck.
        taps: ``below``: the layers before the last, whose outputs the server never sees; ``all``: z itself too, which
            the server could do as well.
        server: width of a bottleneck on z at the *server*, 0: none. What capacity at z alone is worth: beside a server
            that has it, a client's gain is the client's.

    Reference: Ladder Side-Tuning, Sung et al., arXiv 2206.06522; Zhang et al., Side-Tuning, arXiv 1912.13503.
    """

    client: int = 16
    taps: Literal["below", "all"] = "below"
    server: int = 0

    def __post_init__(self) -> None:
        if self.client < 0 or self.server < 0 or not self.client + self.server:
            raise ValueError(f"side.client={self.client}, side.server={self.server}: widths are >= 0, one of them > 0.")

    def tapped(self, cut: int) -> range:
        """Numbers of the layers with a bottleneck.

        Raises:
            SplitError: there is no layer below the last one.
        """
        taps = range(cut if self.taps == "all" else cut - 1)
        if self.client and not taps:
            raise SplitError(
                f"side.taps='below' with cut={cut}: the client's only layer gives z itself; set side.taps: all, or a "
                "deeper cut."
            )
        return taps if self.client else range(0)


class Bottleneck(nn.Module):
    """``q = up(pool(GELU(down(norm(h)))))``, fp32 whatever the backbone; ``up`` is zero at the start.

    Args:
        given: Shape of ``h`` without the batch: ``(S, d)``, ``(d,)``, or a map ``(d, H, W)``.
        wanted: Shape of z, likewise.
        width: Of the bottleneck.
    """

    def __init__(self, given: Sequence[int], wanted: Sequence[int], width: int) -> None:
        super().__init__()
        self.size = tuple(wanted[1:]) if len(wanted) == 3 and tuple(given[1:]) != tuple(wanted[1:]) else None
        if (len(given) == 3) != (len(wanted) == 3):
            raise SplitError(f"no side adapter leads from features of shape {tuple(given)} to {tuple(wanted)}.")
        self.down = nn.Linear(channels(given), width, bias=False, dtype=torch.float32)
        self.up = nn.Linear(width, channels(wanted), bias=False, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)

    def squeeze(self, h: Tensor) -> Tensor:
        """``(B, S, width)`` of ``h (B, S, d)``, ``(B, d)`` or ``(B, d, H, W)``, at z's resolution."""
        x = rows(h).to(self.down.weight.dtype)
        a = F.gelu(self.down(F.layer_norm(x, x.shape[-1:])))
        if self.size is None:
            return a
        grid = a.transpose(1, 2).unflatten(2, h.shape[2:])
        return F.adaptive_avg_pool2d(grid, self.size).flatten(2).transpose(1, 2)

    def forward(self, h: Tensor) -> Tensor:
        """``q``, ``(B, S, channels of z)``."""
        return cast(Tensor, self.up(self.squeeze(h)))


class Tap(nn.ModuleDict):
    """A layer's bottleneck under the name of its adapter, as PEFT holds adapters."""

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__({ADAPTER: bottleneck})

    @property
    def bottleneck(self) -> Bottleneck:
        """The adapter."""
        return cast(Bottleneck, self[ADAPTER])


class ServerTap(Tap):
    """``z ← z + q(z)`` in front of the server's first layer."""

    def enter(self, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A pre-hook of that layer."""
        return (add(args[0], self.bottleneck(args[0])), *args[1:])


Watch = Callable[[Bottleneck, Tensor], None]


class Ladder:
    """The client's taps in one forward: what is squeezed at each layer, and added up at the cut.

    Kept between a layer and the cut is the squeezed output ``(B, S, width)``, not a tensor of z's size.

    Args:
        layers: The client's layers in order; their hooks are this object's methods.
        taps: Number of the layer of each bottleneck.
    """

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int]) -> None:
        self.last = len(taps)
        self.squeezed: list[tuple[Bottleneck, Tensor]] = []
        self.kept: list[tuple[Bottleneck, Tensor]] | None = None
        self.watch: Watch | None = None
        self.watched = 0
        layers[0].register_forward_pre_hook(self._start)
        for number in taps:
            layers[number].register_forward_hook(self._tap)
        layers[-1].register_forward_hook(self._finish)

    def _start(self, *_: Any) -> None:
        self.squeezed.clear()
        self.watched = 0

    def _tap(self, layer: nn.Module, _args: Any, output: Any) -> None:
        bottleneck, h = getattr(layer, NAME).bottleneck, _features(output)
        if self.watch is None:
            self.squeezed.append((bottleneck, bottleneck.squeeze(h)))
            if self.kept is not None:  # a map may be overwritten by the next layer, if that works in place
                self.kept.append((bottleneck, h.clone() if h.ndim == 4 else h))
            return
        self.watch(bottleneck, h)
        self.watched += 1
        if self.watched == self.last:
            raise _Seen

    def _finish(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        z = _features(output)
        while self.squeezed:
            bottleneck, a = self.squeezed.pop(0)
            z = add(z, bottleneck.up(a))
        return (z, *output[1:]) if isinstance(output, tuple) else z

    @contextmanager
    def keeping(self) -> Iterator[list[tuple[Bottleneck, Tensor]]]:
        """While open, forwards leave each bottleneck and its ``h`` in the list."""
        self.kept = kept = []
        try:
            yield kept
        finally:
            self.kept = None

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """While open, a forward calls ``watch(bottleneck, h)`` at each tap and ends, without z, after the last one."""
        self.watch = watch
        try:
            yield
        except _Seen:
            pass
        finally:
            self.watch = None


class _Seen(Exception):
    """The last tap has been watched; nobody waits for what comes after it."""


def attach_side(
    layers: Sequence[nn.Module], cut: int, shapes: Sequence[Sequence[int]], side: Side, seed: int = 0
) -> None:
    """Give the layers of a whole model their bottlenecks, in place; then split it: halves share layers with the whole.

    Args:
        layers: of the whole model, in order.
        cut: number of layers the client holds.
        shapes: of each layer's output without the batch.
        side: widths and taps.
        seed: of ``down``'s random values; the global random state is left alone.

    Raises:
        SplitError: no layer to tap, or one whose output has another kind of shape than z.
    """
    taps, device = side.tapped(cut), next(layers[0].parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for number in taps:
            layers[number].add_module(NAME, Tap(Bottleneck(shapes[number], shapes[cut - 1], side.client)).to(device))
        if side.server:
            tap = ServerTap(Bottleneck(shapes[cut - 1], shapes[cut - 1], side.server)).to(device)
            layers[cut].add_module(NAME, tap)
            layers[cut].register_forward_pre_hook(tap.enter)
    if taps:
        Ladder(layers[:cut], taps)


def ladder(half: nn.Module) -> Ladder | None:
    """The taps of a client half; None: it has no side adapter."""
    layers: Any = half.layers  # type: ignore[union-attr]
    hooks = [hook for layer in layers.values() for hook in layer._forward_hooks.values()]
    return next((h.__self__ for h in hooks if isinstance(getattr(h, "__self__", None), Ladder)), None)


def channels(shape: Sequence[int]) -> int:
    """Of features: the first number of a map's shape ``(C, H, W)``, else the last."""
    return shape[0] if len(shape) == 3 else shape[-1]


def rows(features: Tensor) -> Tensor:
    """Features of a batch as ``(B, S, channels)``: a map's pixels row by row, tokens as they are, a vector as one."""
    if features.ndim == 2:
        return features[:, None]
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def add(features: Tensor, q: Tensor) -> Tensor:
    """``features + q``, for q of shape ``(B, S, channels)``, in the dtype and shape of the features."""
    q = q.to(features.dtype)
    return features + (q.transpose(1, 2) if features.ndim == 4 else q).reshape(features.shape)


def _features(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def add_side(model: PreTrainedModel, cut: int, side: Side, seed: int = 0) -> None:
    """`attach_side` for a causal LM or a sequence classifier."""
    found = find_layers(model)
    check_cut(cut, found, type(model).__name__)
    layers = [model.get_submodule(f"{found.path}.{i}") for i in range(found.num_layers)]
    attach_side(layers, cut, [(0, model.config.get_text_config().hidden_size)] * found.num_layers, side, seed)
