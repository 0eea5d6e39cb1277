"""Side adapters: bottlenecks that lead from the layers below the cut straight to the smashed data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from hosfl_lightning.optim.compiled import eager
from hosfl_lightning.split.errors import SplitError
from hosfl_lightning.split.views import has_parameters

#: The attribute of a layer that holds its bottleneck; PEFT's own LoRA has ``lora_`` in its names too.
NAME = "lora_side"
ADAPTER = "default"
#: Added to the seed of what the server draws: it starts the same whatever its clients have, and not as they do. Torch's
#: generator reads the lower 32 bits of a seed.
SERVER_SEED = 0x9E3779B9


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
        kernel: of ``down`` on feature maps, at client and server: side of a square convolution, odd. 1 looks at each
            pixel alone; 3 costs nine times the values. Tokens and vectors have no neighbours there, and take 1.

    Reference: Ladder Side-Tuning, Sung et al., arXiv 2206.06522; Zhang et al., Side-Tuning, arXiv 1912.13503.
    """

    client: int = 16
    taps: Literal["below", "all"] = "below"
    server: int = 0
    kernel: int = 1

    def __post_init__(self) -> None:
        if self.client < 0 or self.server < 0 or not self.client + self.server:
            raise ValueError(f"side.client={self.client}, side.server={self.server}: widths are >= 0, one of them > 0.")
        if self.taps not in ("below", "all"):
            raise ValueError(f"side.taps={self.taps!r}: below (the layers before the last) or all (z itself as well).")
        if self.kernel < 1 or not self.kernel % 2:
            raise ValueError(f"side.kernel={self.kernel}: an odd number, 1 or more.")

    def tapped(self, layers: Sequence[nn.Module]) -> list[int]:
        """Numbers of the client's layers with a bottleneck: those with parameters, and the last one if ``all``.

        A layer without parameters (the ReLU between two convolutions) tells nothing that the one before it does not.

        Raises:
            SplitError: there is no such layer.
        """
        below = [number for number, layer in enumerate(layers[:-1]) if has_parameters(layer)]
        taps = [*below, len(layers) - 1] if self.taps == "all" else below
        if self.client and not taps:
            raise SplitError(
                f"side.taps='below' with cut={len(layers)}: no layer with parameters is below the one that gives z "
                "itself; set side.taps: all, or a deeper cut."
            )
        return taps if self.client else []


class Bottleneck(nn.Module):
    """``q = up(pool(GELU(down(norm(h)))))``, fp32 whatever the backbone; ``up`` is zero at the start.

    Args:
        given: Shape of ``h`` without the batch: ``(S, d)``, ``(d,)``, or a map ``(d, H, W)``.
        wanted: Shape of z, likewise.
        width: Of the bottleneck.
        kernel: Of ``down``, on maps alone; around a map are zeros.
    """

    def __init__(self, given: Sequence[int], wanted: Sequence[int], width: int, kernel: int = 1) -> None:
        super().__init__()
        if len(given) != len(wanted) or not 1 <= len(wanted) <= 3 or (len(wanted) == 2 and given[0] != wanted[0]):
            raise SplitError(
                f"no side adapter leads from a layer's features of shape {tuple(given)} to the smashed data of shape "
                f"{tuple(wanted)}: both are maps, or vectors, or the same number of tokens; move the cut to where the "
                "client's layers agree, or set side to null."
            )
        pooled = len(wanted) == 3 and tuple(given[1:]) != tuple(wanted[1:])
        self.size = (wanted[1], wanted[2]) if pooled else None
        if kernel > 1 and len(given) != 3:
            raise SplitError(
                f"side.kernel={kernel} looks at the neighbours of a pixel, and a layer's features of shape "
                f"{tuple(given)} are no map; set it to 1."
            )
        self.down: nn.Linear | nn.Conv2d = (
            nn.Linear(channels(given), width, bias=False, dtype=torch.float32)
            if kernel == 1
            else nn.Conv2d(channels(given), width, kernel, padding=kernel // 2, bias=False, dtype=torch.float32)
        )
        self.up = nn.Linear(width, channels(wanted), bias=False, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)

    def squeeze(self, h: Tensor) -> Tensor:
        """``(B, S, width)`` of ``h (B, S, d)``, ``(B, d)`` or ``(B, d, H, W)``, at z's resolution."""
        x = rows(h).to(self.down.weight.dtype)
        x = F.layer_norm(x, x.shape[-1:])
        if isinstance(self.down, nn.Linear):
            a = F.gelu(self.down(x))
        else:
            a = F.gelu(rows(self.down(pixels(x, h.shape[2:]))))
        return a if self.size is None else rows(F.adaptive_avg_pool2d(pixels(a, h.shape[2:]), self.size))

    def forward(self, h: Tensor) -> Tensor:
        """``q``, ``(B, S, channels of z)``."""
        return cast(Tensor, self.up(self.squeeze(h)))


class Tap(nn.ModuleDict, BaseTunerLayer):
    """A layer's bottleneck under the name of its adapter, as PEFT holds, saves, switches and freezes adapters."""

    adapter_layer_names = ("adapters",)

    def __init__(self, bottleneck: Bottleneck, adapter: str = ADAPTER) -> None:
        super().__init__({adapter: bottleneck})
        self._active_adapter = [adapter]

    def forward(self, features: Tensor) -> Tensor:
        """The same: a layer that is an ``nn.Sequential`` takes it for one more child."""
        return features

    def get_base_layer(self) -> nn.Module:
        """Nothing: a tap stands beside its layer and wraps none, so it has no weight of a base."""
        return nn.Identity()

    @property
    def adapters(self) -> Tap:
        """PEFT asks a layer for its adapters by name."""
        return self

    @property
    def bottleneck(self) -> Bottleneck | None:
        """The adapter; None while it is disabled or another one is active."""
        active = None if self.disable_adapters else next((a for a in self.active_adapters if a in self), None)
        return None if active is None else cast(Bottleneck, self[active])


def of_side(name: str) -> bool:
    """Whether a parameter is a side adapter's, by its name in a model or a half."""
    return NAME in name.split(".")


Watch = Callable[[Bottleneck, Tensor], None]


class Ladder:
    """The client's taps in one forward: what is squeezed at each layer, and added up at the cut.

    Kept between a layer and the cut are the squeezed outputs ``(B, S, width)``, or the sum of all ``up`` where that is
    less: never more than one tensor of z's size.

    Args:
        layers: The client's layers in order; their hooks are this object's methods.
        taps: Number of the layer of each bottleneck.
    """

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int]) -> None:
        self.last = len(taps)
        self.squeezed: list[tuple[Bottleneck, Tensor]] = []
        self.sum: Tensor | None = None
        self.kept: list[tuple[Bottleneck, Tensor]] | None = None
        self.watch: Watch | None = None
        self.watched = 0
        layers[0].register_forward_pre_hook(self._start)
        for number in taps:
            layers[number].register_forward_hook(self._tap)
        layers[-1].register_forward_hook(self._finish)

    def _start(self, *_: Any) -> None:
        self.squeezed.clear()
        self.sum = None
        self.watched = 0

    def _tap(self, layer: nn.Module, _args: Any, output: Any) -> None:
        bottleneck, h = getattr(layer, NAME).bottleneck, features_of(output)
        if bottleneck is None:
            return
        if self.watch is None:
            self._keep(bottleneck, bottleneck.squeeze(h))
            if self.kept is not None:  # the next layer may work in place
                self.kept.append((bottleneck, h.clone()))
            return
        self.watch(bottleneck, h)
        self.watched += 1
        if self.watched == self.last:
            raise _Seen

    def _keep(self, bottleneck: Bottleneck, a: Tensor) -> None:
        if self.last * a.shape[-1] <= bottleneck.up.out_features:
            self.squeezed.append((bottleneck, a))
        else:
            self.sum = bottleneck.up(a) if self.sum is None else self.sum + bottleneck.up(a)

    def _finish(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        z = features_of(output)
        while self.squeezed:
            bottleneck, a = self.squeezed.pop(0)
            z = add(z, bottleneck.up(a))
        if self.sum is not None:
            z, self.sum = add(z, self.sum), None
        return (z, *output[1:]) if isinstance(output, tuple) else z

    @contextmanager
    def keeping(self) -> Iterator[list[tuple[Bottleneck, Tensor]]]:
        """While open, forwards, which run eagerly, leave each bottleneck and its ``h`` in the list."""
        kept: list[tuple[Bottleneck, Tensor]] = []
        self.kept = kept
        try:
            with eager():
                yield kept
        finally:
            self.kept = None

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """While open, a forward calls ``watch(bottleneck, h)`` at each tap and ends, without z, after the last one."""
        self.watch = watch
        try:
            with eager():
                yield
        except _Seen:
            pass
        finally:
            self.watch = None


class _Seen(Exception):
    """The last tap has been watched; nobody waits for what comes after it."""


def attach_side(
    layers: Sequence[nn.Module],
    cut: int,
    shapes: Sequence[Sequence[int]],
    side: Side,
    seed: int = 0,
    adapter: str = ADAPTER,
) -> None:
    """Give the layers of a whole model their bottlenecks, in place; then split it: halves share layers with the whole.

    Args:
        layers: of the whole model, in order; beyond the server's first one they are not read.
        cut: number of layers the client holds.
        shapes: of each client layer's output without the batch.
        side: widths and taps.
        seed: of ``down``'s random values, drawn for each half apart; the global random state is left alone.
        adapter: its name in PEFT.

    Raises:
        SplitError: no layer to tap, one whose output has another kind of shape than z, or a side adapter is there.
    """
    if any(NAME in layer._modules for layer in layers[: cut + 1]):
        raise SplitError(
            "the model has a side adapter already, and a second one would be added to it: load the base model anew, or "
            "take the first one out with detach_side."
        )
    taps, z = side.tapped(layers[:cut]), shapes[cut - 1]
    device = next((p.device for layer in layers for p in layer.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        below = {number: Tap(Bottleneck(shapes[number], z, side.client, side.kernel), adapter) for number in taps}
        torch.default_generator.manual_seed(seed + SERVER_SEED)
        above = Tap(Bottleneck(z, z, side.server, side.kernel), adapter) if side.server else None
    for number, tap in below.items():
        layers[number].add_module(NAME, _on(tap, device))
    if above is not None:
        layers[cut].add_module(NAME, _on(above, device))
        layers[cut].register_forward_pre_hook(enter)
    if taps:
        Ladder(layers[:cut], taps)


def enter(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pre-hook of the server's first layer: ``z ← z + q(z)`` with its bottleneck."""
    bottleneck = cast(Tap, getattr(layer, NAME)).bottleneck
    return args if bottleneck is None else (add(args[0], bottleneck(args[0])), *args[1:])


def _on(tap: Tap, device: torch.device) -> Tap:
    held = next(tap.parameters()).device
    return tap if held.type == "meta" else tap.to(device)  # PEFT's low_cpu_mem_usage brings the values later


def detach_side(model: nn.Module) -> None:
    """Take the bottlenecks of `attach_side` out again, in place."""
    for module in list(model.modules()):
        module._modules.pop(NAME, None)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is enter or isinstance(_owner(hook), Ladder)]:
                del hooks[key]


def ladder(half: nn.Module) -> Ladder | None:
    """The taps of a client half, or of a whole model; None: it has no side adapter."""
    hooks = [hook for layer in half.modules() for hook in layer._forward_hooks.values()]
    return next((owner for owner in map(_owner, hooks) if isinstance(owner, Ladder)), None)


def _owner(hook: Any) -> object:
    return getattr(hook, "__self__", None)


def channels(shape: Sequence[int]) -> int:
    """Of features: the first number of a map's shape ``(C, H, W)``, else the last."""
    return shape[0] if len(shape) == 3 else shape[-1]


def rows(features: Tensor) -> Tensor:
    """Features of a batch as ``(B, S, channels)``: a map's pixels row by row, tokens as they are, a vector as one."""
    if features.ndim == 2:
        return features[:, None]
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def pixels(a: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, S, channels)`` as a map ``(B, channels, H, W)`` of that size: what `rows` undoes."""
    return a.transpose(1, 2).unflatten(2, tuple(size))


def add(features: Tensor, q: Tensor) -> Tensor:
    """``features + q``, for q of shape ``(B, S, channels)``, in the dtype and shape of the features."""
    q = q.to(features.dtype)
    return features + (q.transpose(1, 2) if features.ndim == 4 else q).reshape(features.shape)


def features_of(output: Any) -> Tensor:
    """The hidden state among what a layer returns."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
