"""Heads in closed form: loss, multiplier and gradients of norms, linear layers and cross entropy, without autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
#: Elements of the largest tensor that is made: 16 MiB in fp32.
PIECE = 1 << 22

#: Sums of gradients, of the parameters that are asked for.
Gradients = Mapping[nn.Parameter, Tensor]
Place = Literal["every", "first", "last"]


def following(labels: Tensor) -> Tensor:
    """``labels (B, S)`` of the next token: position t has that of t + 1, the last one none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - x.tanh().square()


def _relu_slope(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


class Activation(NamedTuple):
    """``y = f(x)``, elementwise.

    Attributes:
        value: ``f``.
        slope: ``f'``.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Of rows."""
        return self.value(x)

    def backward(self, x: Tensor, g: Tensor, sums: Gradients) -> Tensor:
        """``g ⊙ f'(x)``."""
        return g * self.slope(x)


ACTIVATIONS = {
    "tanh": Activation(torch.tanh, _tanh_slope),
    "relu": Activation(F.relu, _relu_slope),
    "gelu": Activation(F.gelu, _gelu_slope),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """``y = (offset + w) ⊙ u + b``, ``u = c / √(mean c² + ε)``, ``c = x − mean x`` where ``centred``, else ``x``.

    LayerNorm is centred; RMSNorm is not; Gemma's weight counts from ``offset`` 1.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    eps: float
    centred: bool
    offset: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Of rows ``(n, h)``."""
        y = self._normed(x)[0] * self._gain(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def backward(self, x: Tensor, g: Tensor, sums: Gradients) -> Tensor:
        """``r (a − mean a − u mean(a ⊙ u))``, ``a = g ⊙ (offset + w)``, ``r = u / c``; ``mean a`` if centred."""
        u, r = self._normed(x)
        _add(sums, self.weight, lambda: (g * u).sum(0))
        _add(sums, self.bias, lambda: g.sum(0))
        a = g * self._gain(x)
        a = a - u * (a * u).mean(-1, keepdim=True)
        return r * (a - a.mean(-1, keepdim=True) if self.centred else a)

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = x - x.mean(-1, keepdim=True) if self.centred else x
        r = torch.rsqrt(c.square().mean(-1, keepdim=True) + self.eps)
        return c * r, r

    def _gain(self, x: Tensor) -> Tensor:
        return x.new_ones(()) if self.weight is None else self.offset + self.weight.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """``y = W x + s B A x + b``, or some rows of it.

    Attributes:
        weight: ``W``.
        bias: ``b``.
        low: LoRA's ``A``, ``B`` and ``s``; None: there is none.
        rows: Which.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    low: tuple[nn.Parameter, nn.Parameter, float] | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def __call__(self, x: Tensor) -> Tensor:
        """Of rows ``(n, h)``."""
        bias = None if self.bias is None else self.bias[self.rows].to(x.dtype)
        y = F.linear(x, self.weight[self.rows].to(x.dtype), bias)
        if self.low is not None:
            a, b, scale = self.low
            y += scale * (x @ a.to(x.dtype).T) @ b[self.rows].to(x.dtype).T
        return y

    def backward(self, x: Tensor, g: Tensor, sums: Gradients) -> Tensor:
        """``g W + s g B A``."""
        _add(sums, self.weight, lambda: g.T @ x, self.rows)
        _add(sums, self.bias, lambda: g.sum(0), self.rows)
        back = g @ self.weight[self.rows].to(g.dtype)
        if self.low is not None:
            a, b, scale = self.low
            within = scale * g @ b[self.rows].to(g.dtype)
            _add(sums, a, lambda: within.T @ x)
            _add(sums, b, lambda: g.T @ (scale * x @ a.to(x.dtype).T), self.rows)
            back += within @ a.to(g.dtype)
        return back


Step = Norm | Dense | Activation


@dataclass(frozen=True, eq=False)
class Output:
    """Logits ``c tanh(s a / c)``, ``a = W x + b``, and their cross entropy; without a soft cap c, ``s a``."""

    linear: Dense
    scale: float = 1.0
    cap: float | None = None

    def squash(self, a: Tensor) -> Tensor:
        """Logits of ``a``."""
        return self.scale * a if self.cap is None else self.cap * torch.tanh(self.scale / self.cap * a)

    def cross_entropy(self, x: Tensor, ids: Tensor, share: float, sums: Gradients) -> tuple[Tensor, Tensor]:
        """``share · Σ_t ℓ_t`` and its gradient by ``x``: ``share · (softmax − one-hot) ⊙ slope · W``.

        Two passes over pieces of the vocabulary: the logarithm of the sum of exponentials, then the gradient.

        Args:
            x: ``(n, h)``.
            ids: ``(n,)``.
            share: Of a term.
            sums: To which the gradients of the linear layer are added.
        """
        total = x.new_full((len(x),), -math.inf)
        hit = x.new_zeros(len(x))
        for piece in self._pieces(x):
            logits = self.squash(replace(self.linear, rows=piece)(x))
            total = torch.logaddexp(total, logits.logsumexp(-1))
            row, column = _inside(ids, piece)
            hit[row] = logits[row, column]
        g = torch.zeros_like(x)
        for piece in self._pieces(x):
            part = replace(self.linear, rows=piece)
            logits = self.squash(part(x))
            slope = self.scale * (1 - (logits / self.cap).square()) if self.cap is not None else self.scale
            delta = logits.sub_(total[:, None]).exp_()
            delta[_inside(ids, piece)] -= 1
            g += part.backward(x, delta.mul_(slope).mul_(share), sums)
        return share * (total - hit).sum(), g

    def _pieces(self, x: Tensor) -> Iterator[slice]:
        vocabulary, width = self.linear.weight.shape
        columns = max(1, PIECE // max(width, len(x)))
        return (slice(i, min(i + columns, vocabulary)) for i in range(0, vocabulary, columns))


class Differentiated(NamedTuple):
    """Of a batch.

    Attributes:
        loss: ``ℓ``, the mean over the loss terms, fp32, ``()``; NaN where there are none.
        multiplier: ``λ₂ = ∂ℓ/∂z₂``, ``(B, S, h)`` in the dtype of ``z₂``; zero at positions without a loss term.
        gradients: Of ``ℓ`` in each parameter asked for, fp32.
    """

    loss: Tensor
    multiplier: Tensor
    gradients: list[Tensor]


@dataclass(frozen=True, eq=False)
class ClosedHead:
    """``z₂ → steps → logits → cross entropy``, row by row.

    Attributes:
        place: Which positions of a row have logits: every (the label is the next token), the first, or the last valid.
        steps: Before the last linear layer.
        output: That layer and what follows it.
    """

    place: Place
    steps: tuple[Step, ...]
    output: Output

    @torch.no_grad()
    def logits(self, z: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``(B, S, V)`` or ``(B, C)``, of a batch small enough for it."""
        x = z if self.place == "every" else z.flatten(0, 1)[places(self.place, z, attention_mask)]
        x = x.to(_wide(z))
        for step in self.steps:
            x = step(x)
        return self.output.squash(self.output.linear(x))

    @torch.no_grad()
    def differentiate(
        self, z: Tensor, attention_mask: Tensor | None, labels: Tensor, trained: Sequence[nn.Parameter] = ()
    ) -> Differentiated:
        """Loss, multiplier and gradients, a piece of the labelled positions at a time, summed in fp32.

        Args:
            z: ``z₂ (B, S, h)``.
            attention_mask: ``(B, S)``; None: no padding.
            labels: ``(B, S)``, not shifted, −100 where there is none; ``(B,)`` of a classifier.
            trained: The parameters of the head whose gradients are wanted.
        """
        wide = _wide(z)
        if self.place == "every":
            chosen = (following(labels).flatten() != IGNORE).nonzero().squeeze(1)
            ids = following(labels).flatten()[chosen]
        else:
            chosen, ids = places(self.place, z, attention_mask), labels
        sums = {p: torch.zeros_like(p, dtype=wide) for p in trained}
        loss = torch.zeros((), dtype=wide, device=z.device)
        multiplier = z.new_zeros(z.shape)
        rows = max(1, PIECE // max(self.output.linear.weight.shape[1], z.shape[-1]))
        with torch.autocast(z.device.type, enabled=False):
            for here, their in zip(chosen.split(rows), ids.split(rows)):
                x = z.flatten(0, 1)[here].to(wide)
                part, g = self._backward(x, their, 1 / max(1, len(chosen)), sums)
                loss += part
                multiplier.view(-1, z.shape[-1])[here] = g.to(z.dtype)
        return Differentiated(loss.float() if len(chosen) else loss.float() * math.nan, multiplier, list(sums.values()))

    def _backward(self, x: Tensor, ids: Tensor, share: float, sums: Gradients) -> tuple[Tensor, Tensor]:
        inputs = []
        for step in self.steps:
            inputs.append(x)
            x = step(x)
        loss, g = self.output.cross_entropy(x, ids, share, sums)
        for step, given in zip(reversed(self.steps), reversed(inputs)):
            g = step.backward(given, g, sums)
        return loss, g


def places(place: Place, z: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Of each row the first or the last valid position, ``(B,)``, counted through the batch."""
    at = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)
    if place == "last":
        mask = torch.ones_like(z[..., 0]) if attention_mask is None else attention_mask.to(z.device)
        at = (torch.arange(z.shape[1], device=z.device) * mask.bool()).argmax(-1)
    return at + z.shape[1] * torch.arange(z.shape[0], device=z.device)


def _wide(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def _inside(ids: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
    """Rows whose id is in the piece, and where in it."""
    row = ((ids >= piece.start) & (ids < piece.stop)).nonzero().squeeze(1)
    return row, ids[row] - piece.start


def _add(
    sums: Gradients, parameter: nn.Parameter | None, gradient: Callable[[], Tensor], piece: slice = slice(None)
) -> None:
    if parameter is not None and parameter in sums:
        sums[parameter][piece] += gradient()
