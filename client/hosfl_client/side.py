"""The side adapter: a bottleneck that leads from a layer straight to z, and its exact gradient from λ alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from hosfl_client.bfloat16 import Array, Floats, widen
from hosfl_client.gelu import gelu

#: Elements of h that are worked on at a time, in whole positions: 128 KiB in fp32. Of a map it is one example.
ELEMENTS = 1 << 15
#: Of the layer norm.
EPS = np.float32(1e-5)


class Bottleneck:
    """``q = up(pool(GELU(down(norm(h)))))``, a part of z; ``norm`` is over channels and has no weights, nothing a bias.

    Args:
        down: ``(width, d)``; or, on maps, ``(width, d, k, k)``: a convolution with zeros around the map, k odd.
        up: ``(channels of z, width)``.
        pooled: Height and width to which a map is averaged, adaptively; None: it has z's already.

    Raises:
        ValueError: Shapes that do not fit each other.
    """

    def __init__(self, down: Floats, up: Floats, pooled: tuple[int, int] | None = None) -> None:
        fits = up.ndim == 2 and down.ndim in (2, 4) and up.shape[1] == len(down)
        if not fits or (down.ndim == 4 and (down.shape[2] != down.shape[3] or not down.shape[2] % 2)):
            raise ValueError(f"no bottleneck has down {[*down.shape]} and up {[*up.shape]}")
        self.down, self.up, self.pooled = down, up, pooled

    def forward(self, h: Array) -> Floats:
        """``q (B, S, channels of z)`` of ``h (B, S, d)``, ``(B, d)`` or a map ``(B, d, H, W)``."""
        parts = [part.squeeze(self) @ self.up.T for part in self._parts(h)]
        flat: Floats = np.concatenate(parts) if parts else np.empty((0, len(self.up)), np.float32)
        return flat.reshape(len(h), -1 if len(h) else 0, len(self.up))

    def add_gradient(self, totals: Sequence[Floats], h: Array, multiplier: Array) -> None:
        r"""``G += ∂⟨λ, q(h)⟩/∂(down, up)``, in place; beside h and λ there is one part of h in a few copies.

        Args:
            totals: Two arrays, fp32, of the shapes of ``down`` and ``up``.
            h: As of `forward`.
            multiplier: ``λ (B, S, channels of z)``.

        Raises:
            ValueError: λ is not of q's shape.
        """
        down, up = totals
        factors = multiplier.reshape(-1, multiplier.shape[-1])
        positions = len(h) * (h.shape[1] if h.ndim == 3 else 1)
        if h.ndim == 4:
            positions = len(h) * int(np.prod(self.pooled or h.shape[2:]))
        if factors.shape != (positions, len(self.up)):
            raise ValueError(f"λ is {[*multiplier.shape]}, and {positions} positions of {len(self.up)} are wanted")
        start = 0
        for part in self._parts(h):
            a = part.squeeze(self)
            factor = widen(factors[start : start + len(a)])
            start += len(a)
            up += factor.T @ a
            part.back(self, factor @ self.up, down)

    def _parts(self, h: Array) -> Iterator[_Rows | _Map]:
        if h.ndim == 4:
            for example in h:
                yield _Map(example)
            return
        flat = h.reshape(-1, h.shape[-1])
        step = max(1, ELEMENTS // max(1, flat.shape[1]))
        for start in range(0, len(flat), step):
            yield _Rows(flat[start : start + step])


class _Rows:
    """Some positions of a bottleneck's input, each for itself."""

    def __init__(self, h: Array) -> None:
        self.x = normalized(h)

    def squeeze(self, bottleneck: Bottleneck) -> Floats:
        """``pool(GELU(down(norm(h))))``, (positions, width)."""
        a, self.slope = gelu(self.x @ bottleneck.down.reshape(len(bottleneck.down), -1).T)
        return a

    def back(self, bottleneck: Bottleneck, cotangent: Floats, total: Floats) -> None:
        """``total += ∂⟨cotangent, squeeze⟩/∂down``."""
        total += ((cotangent * self.slope).T @ self.x).reshape(total.shape)


class _Map:
    """One example of a bottleneck's input that is a map ``(d, H, W)``: pixels row by row."""

    def __init__(self, h: Array) -> None:
        self.size = h.shape[1], h.shape[2]
        self.x = normalized(h.reshape(len(h), -1).T)

    def squeeze(self, bottleneck: Bottleneck) -> Floats:
        """As `_Rows.squeeze`, at z's resolution."""
        width, kernel = len(bottleneck.down), self._kernel(bottleneck)
        before = np.zeros((len(self.x), width), np.float32)
        for i, j, patch in self._patches(bottleneck):
            before += patch @ kernel[:, :, i, j].T
        a, self.slope = gelu(before)
        if bottleneck.pooled is None:
            return a
        rows, columns = (_bins(have, want) for have, want in zip(self.size, bottleneck.pooled))
        pixels = a.reshape(*self.size, width)
        return np.einsum("ih,jw,hwc->ijc", rows, columns, pixels, optimize=True).reshape(-1, width)

    def back(self, bottleneck: Bottleneck, cotangent: Floats, total: Floats) -> None:
        """As `_Rows.back`."""
        if bottleneck.pooled is not None:
            rows, columns = (_bins(have, want) for have, want in zip(self.size, bottleneck.pooled))
            pooled = cotangent.reshape(*bottleneck.pooled, -1)
            cotangent = np.einsum("ih,jw,ijc->hwc", rows, columns, pooled, optimize=True).reshape(len(self.x), -1)
        before, kernel = cotangent * self.slope, self._kernel(bottleneck).shape
        for i, j, patch in self._patches(bottleneck):
            total.reshape(kernel)[:, :, i, j] += before.T @ patch

    def _kernel(self, bottleneck: Bottleneck) -> Floats:
        down = bottleneck.down
        return down if down.ndim == 4 else down[:, :, None, None]

    def _patches(self, bottleneck: Bottleneck) -> Iterator[tuple[int, int, Floats]]:
        """What each entry of the kernel sees: ``(row, column, (H·W, d))``."""
        side = self._kernel(bottleneck).shape[2]
        if side == 1:
            yield 0, 0, self.x
            return
        height, width = self.size
        around = np.pad(self.x.reshape(height, width, -1), ((side // 2,) * 2, (side // 2,) * 2, (0, 0)))
        for i in range(side):
            for j in range(side):
                yield i, j, around[i : i + height, j : j + width].reshape(len(self.x), -1)


def normalized(h: Array) -> Floats:
    """``(h − mean)/√(variance + 1e-5)`` of each row, fp32."""
    x = np.empty(h.shape, np.float32)
    widen(h, x)
    x -= x.mean(1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True) + EPS)
    return x


@lru_cache(maxsize=16)
def _bins(have: int, want: int) -> Floats:
    """(want, have): bin i of an adaptive average holds the places ⌊i have/want⌋ .. ⌈(i+1) have/want⌉ − 1."""
    bins = np.zeros((want, have), np.float32)
    for i in range(want):
        start, stop = i * have // want, -(-(i + 1) * have // want)
        bins[i, start:stop] = 1 / (stop - start)
    return bins
