"""A client's head on plain arrays: loss, multiplier and gradients of norm, linear layers and cross entropy.

Arithmetic is in fp32, and in fp64 where z₂ is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hosfl_client.bfloat16 import BFLOAT16, Array, cast, widen
from hosfl_client.gelu import gelu

IGNORE = -100
#: Elements of the largest array that is made: 4 MiB in fp32.
PIECE = 1 << 20

#: Sums of gradients, by the identity of the array that they are of.
Sums = dict[int, Array]
Integers = npt.NDArray[np.integer[Any]]


def _relu(x: Array) -> tuple[Array, Array]:
    return np.maximum(x, 0), (x > 0).astype(x.dtype)


def _tanh(x: Array) -> tuple[Array, Array]:
    y = np.tanh(x)
    return y, 1 - y * y


#: Value and slope.
ACTIVATIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {"tanh": _tanh, "relu": _relu, "gelu": gelu}


@dataclass(frozen=True)
class Activation:
    """``y = f(x)``, elementwise: tanh, relu or gelu."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation {self.name!r:.40}: one of {', '.join(ACTIVATIONS)}")

    def __call__(self, x: Array) -> Array:
        """Of rows."""
        return ACTIVATIONS[self.name](x)[0]

    def backward(self, x: Array, g: Array, sums: Sums) -> Array:
        """``g ⊙ f'(x)``."""
        return g * ACTIVATIONS[self.name](x)[1]


@dataclass(frozen=True, eq=False)
class Norm:
    """``y = (offset + w) ⊙ u + b``, ``u = c / √(mean c² + ε)``, ``c = x − mean x`` where ``centred``, else ``x``."""

    weight: Array | None
    bias: Array | None
    eps: float
    centred: bool
    offset: float = 0.0

    def __call__(self, x: Array) -> Array:
        """Of rows ``(n, h)``."""
        y = self._normed(x)[0] * self._gain(x)
        return y if self.bias is None else y + wide(self.bias, x)

    def backward(self, x: Array, g: Array, sums: Sums) -> Array:
        """``r (a − mean a − u mean(a ⊙ u))``, ``a = g ⊙ (offset + w)``, ``r = u / c``; ``mean a`` if centred."""
        u, r = self._normed(x)
        _add(sums, self.weight, lambda: (g * u).sum(0))
        _add(sums, self.bias, lambda: g.sum(0))
        a = g * self._gain(x)
        a = a - u * (a * u).mean(-1, keepdims=True)
        return r * (a - a.mean(-1, keepdims=True) if self.centred else a)

    def _normed(self, x: Array) -> tuple[Array, Array]:
        c = x - x.mean(-1, keepdims=True) if self.centred else x
        r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + x.dtype.type(self.eps))
        return c * r, r

    def _gain(self, x: Array) -> Array:
        return np.ones((), x.dtype) if self.weight is None else self.offset + wide(self.weight, x)


@dataclass(frozen=True, eq=False)
class Dense:
    """``y = W x + s B A x + b``, or some rows of it.

    Attributes:
        weight: ``W``.
        bias: ``b``.
        low: LoRA's ``A``, ``B`` and ``s``; None: there is none.
        rows: Which.
    """

    weight: Array
    bias: Array | None
    low: tuple[Array, Array, float] | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def __call__(self, x: Array) -> Array:
        """Of rows ``(n, h)``."""
        y = x @ wide(self.weight[self.rows], x).T
        if self.bias is not None:
            y += wide(self.bias[self.rows], x)
        if self.low is not None:
            a, b, scale = self.low
            y += scale * (x @ wide(a, x).T) @ wide(b[self.rows], x).T
        return y

    def backward(self, x: Array, g: Array, sums: Sums) -> Array:
        """``g W + s g B A``."""
        _add(sums, self.weight, lambda: g.T @ x, self.rows)
        _add(sums, self.bias, lambda: g.sum(0), self.rows)
        back = g @ wide(self.weight[self.rows], g)
        if self.low is not None:
            a, b, scale = self.low
            within = scale * g @ wide(b[self.rows], g)
            _add(sums, a, lambda: within.T @ x)
            _add(sums, b, lambda: g.T @ (scale * x @ wide(a, x).T), self.rows)
            back += within @ wide(a, g)
        return back


Step = Norm | Dense | Activation


@dataclass(frozen=True, eq=False)
class Output:
    """Logits ``c tanh(s a / c)``, ``a = W x + b``, and their cross entropy; without a soft cap c, ``s a``."""

    linear: Dense
    scale: float = 1.0
    cap: float | None = None

    def squash(self, a: Array) -> Array:
        """Logits of ``a``."""
        return self.scale * a if self.cap is None else self.cap * np.tanh(self.scale / self.cap * a)

    def cross_entropy(self, x: Array, ids: Integers, share: float, sums: Sums) -> tuple[float, Array]:
        """``share · Σ_t ℓ_t`` and its gradient by ``x``: ``share · (softmax − one-hot) ⊙ slope · W``.

        Two passes over pieces of the vocabulary: the logarithm of the sum of exponentials, then the gradient.

        Args:
            x: ``(n, h)``.
            ids: ``(n,)``.
            share: Of a term.
            sums: To which the gradients of the linear layer are added.
        """
        total, hit = np.full(len(x), -np.inf, x.dtype), np.zeros(len(x), x.dtype)
        for piece in self._pieces(x):
            logits = self.squash(replace(self.linear, rows=piece)(x))
            top = logits.max(-1)
            total = np.logaddexp(total, top + np.log(np.exp(logits - top[:, None]).sum(-1)))
            row, column = _inside(ids, piece)
            hit[row] = logits[row, column]
        g = np.zeros_like(x)
        for piece in self._pieces(x):
            part = replace(self.linear, rows=piece)
            logits = self.squash(part(x))
            delta = np.exp(logits - total[:, None])
            delta[_inside(ids, piece)] -= 1
            delta *= self.scale * share
            if self.cap is not None:
                delta *= 1 - np.square(logits / self.cap)
            g += part.backward(x, delta, sums)
        return share * float((total - hit).sum(dtype=np.float64)), g

    def _pieces(self, x: Array) -> Iterator[slice]:
        vocabulary, width = self.linear.weight.shape
        columns = max(1, PIECE // max(width, len(x)))
        return (slice(i, min(i + columns, vocabulary)) for i in range(0, vocabulary, columns))


class Differentiated(NamedTuple):
    """Of a batch.

    Attributes:
        loss: ``ℓ``, the mean over the loss terms; NaN where there are none.
        multiplier: ``λ₂ = ∂ℓ/∂z₂``, ``(B, S, h)`` in the dtype of ``z₂``; zero at positions without a loss term.
        gradients: Of ``ℓ`` in each array asked for.
    """

    loss: float
    multiplier: Array
    gradients: list[Array]


@dataclass(frozen=True, eq=False)
class Head:
    """``z₂ → steps → logits → cross entropy``, row by row.

    Attributes:
        place: Which positions of a row have logits: every (the label is the next token), the first, or the last valid.
        steps: Before the last linear layer.
        output: That layer and what follows it.
        trained: Arrays of them that are trained, as they are there; none: a frozen head.
    """

    place: Literal["every", "first", "last"]
    steps: Sequence[Step]
    output: Output
    trained: Sequence[Array] = ()

    def loss_and_multiplier(self, z: Array, mask: Array | None, labels: Integers) -> tuple[float, Array]:
        """``ℓ`` and ``λ₂``."""
        return self.differentiate(z, mask, labels, gradient=False)[:2]

    def gradient(self, z: Array, mask: Array | None, labels: Integers) -> list[Array]:
        """``∂ℓ/∂p`` of each array of ``trained``, in order."""
        return self.differentiate(z, mask, labels).gradients

    def differentiate(self, z: Array, mask: Array | None, labels: Integers, *, gradient: bool = True) -> Differentiated:
        """Loss, multiplier and gradients, a piece of the labelled positions at a time.

        Args:
            z: ``z₂ (B, S, h)``.
            mask: ``(B, S)``; None: no padding.
            labels: ``(B, S)``, not shifted, −100 where there is none; ``(B,)`` of a classifier.
            gradient: Of what is trained as well.
        """
        flat = z.reshape(-1, z.shape[-1])
        chosen, ids = self._terms(z, mask, labels)
        dtype = np.float64 if z.dtype == np.float64 else np.float32
        trained = self.trained if gradient else ()
        sums: Sums = {id(p): np.zeros(p.shape, dtype) for p in trained}
        multiplier, loss = np.zeros(flat.shape, z.dtype), 0.0
        rows = max(1, PIECE // max(self.output.linear.weight.shape[1], z.shape[-1]))
        for start in range(0, len(chosen), rows):
            here = chosen[start : start + rows]
            x = flat[here] if dtype is np.float64 else widen(flat[here])
            part, g = self._backward(x, ids[start : start + rows], 1 / len(chosen), sums)
            loss += part
            multiplier[here] = cast(g, np.empty(g.shape, z.dtype))
        return Differentiated(
            loss if len(chosen) else math.nan, multiplier.reshape(z.shape), [sums[id(p)] for p in trained]
        )

    def _terms(self, z: Array, mask: Array | None, labels: Integers) -> tuple[Integers, Integers]:
        """Positions with a loss term, counted through the batch, and what each should say."""
        size, length = z.shape[:2]
        if self.place == "every":
            targets = np.full((size, length), IGNORE, np.int64)
            targets[:, :-1] = labels[:, 1:]
            chosen = np.flatnonzero(targets != IGNORE)
            return chosen, targets.reshape(-1)[chosen]
        at = np.zeros(size, np.int64)
        if self.place == "last":
            valid = np.ones((size, length), np.bool_) if mask is None else mask.astype(np.bool_)
            at = (np.arange(length) * valid).argmax(-1)
        return at + length * np.arange(size), labels

    def _backward(self, x: Array, ids: Integers, share: float, sums: Sums) -> tuple[float, Array]:
        inputs = []
        for step in self.steps:
            inputs.append(x)
            x = step(x)
        loss, g = self.output.cross_entropy(x, ids, share, sums)
        for step, given in zip(reversed(self.steps), reversed(inputs)):
            g = step.backward(given, g, sums)
        return loss, g


def wide(weight: Array, x: Array) -> Array:
    """``weight`` in the dtype of ``x``."""
    return widen(weight) if weight.dtype == BFLOAT16 else weight.astype(x.dtype, copy=False)


def _inside(ids: Integers, piece: slice) -> tuple[Integers, Integers]:
    """Rows whose id is in the piece, and where in it."""
    row = np.flatnonzero((ids >= piece.start) & (ids < piece.stop))
    return row, ids[row] - piece.start


def _add(sums: Sums, array: Array | None, gradient: Callable[[], Array], piece: slice = slice(None)) -> None:
    if array is not None and id(array) in sums:
        sums[id(array)][piece] += gradient()
