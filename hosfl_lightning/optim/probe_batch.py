"""Probes in a batch: one forward on n copies of the rows, in which what is trained has n values, one a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hosfl_lightning.optim.basis import SharedDirections
from hosfl_lightning.optim.estimators import ESTIMATORS, Probes, measured
from hosfl_lightning.optim.probing import Displacement
from hosfl_lightning.optim.zeroth_order import ZerothOrder

Point = tuple[int, float]
"""A probe and its scale: ``θ + scale · u_probe``."""

Call = tuple[nn.Module, list[tuple[int, ...]]]
"""A leaf that was called, and the shapes of the tensors that it was given."""

SIDES = {"forward": (1.0,), "central": (1.0, -1.0)}
"""Where the estimators that ship evaluate, in units of μ; of ``f(θ)`` the caller knows the value."""


class UnbatchedError(ValueError):
    """The module cannot run several probes in one forward; the message says why."""


def points_of(optimizer: ZerothOrder, basis: SharedDirections) -> list[Point]:
    """Where the estimator will evaluate, beside θ; nothing: it does not say beforehand, or makes dual numbers."""
    sides = next((SIDES.get(name, ()) for name, one in ESTIMATORS.items() if one == optimizer.estimator), ())
    return [(probe, side * optimizer.mu) for probe in range(basis.size) for side in sides]


def estimated(optimizer: ZerothOrder, basis: SharedDirections, values: Mapping[Point, Tensor], base: Tensor) -> Tensor:
    """What the estimator makes of values that are known already, as `ZerothOrder.project` returns it."""
    at: list[Point] = []

    @contextmanager
    def shifted(probe: int, scale: float) -> Iterator[None]:
        at[:] = [(probe, scale)]
        yield

    probes = Probes(basis.size, optimizer.mu, shifted, partial(optimizer.dual, basis))
    return measured(optimizer.estimator, lambda: values[at[0]], probes, base)


class ProbeBatch:
    r"""``f_c(x; θ + s_i u_i)`` for i = 1..n by one forward of the module, on ``x`` n times one below the other.

    A submodule that reads trained tensors runs on the rows of each copy with the bits ``cast(fp32(θ) + s_i u_i)`` that
    a probe alone would give it: a linear layer without bias as one product of batches, any other under `torch.vmap`.
    All else of the module sees a larger batch, so its rows must not depend on each other, as of clients in one batch.
    The extra memory is n times that of a forward, and n copies of what is trained.

    Args:
        optimizer: With its ``module``; tensors outside of ``probed`` stay.
    """

    def __init__(self, optimizer: ZerothOrder) -> None:
        assert optimizer.module is not None
        self.optimizer, self.module = optimizer, optimizer.module

    def _readers(self) -> tuple[list[nn.Module], dict[int, nn.Parameter]]:
        """Who reads what is probed, but for those inside of another one, whose call moves theirs too; and its tensors.

        Returns:
            The submodules, and the tensors by their number in the directions.
        """
        leaves: list[nn.Module] = []
        inside: set[nn.Module] = set()
        tensors: dict[int, nn.Parameter] = {}
        for reader, owned in self.optimizer.readers().of(self.module):
            tensors |= owned
            if reader not in inside:
                leaves.append(reader)
                inside.update(reader.modules())
        return leaves, tensors

    @property
    def nbytes(self) -> int:
        """Of what is probed: what one more probe holds of it."""
        return sum(p.numel() * p.element_size() for p in self._readers()[1].values())

    @contextmanager
    def noting(self) -> Iterator[list[Call]]:
        """The calls of the leaves in the forward that runs inside, to be compared with those of a batch."""
        calls: list[Call] = []

        def note(leaf: nn.Module, *given: Any) -> None:
            calls.append((leaf, [tuple(one.shape) for one in tree_flatten(given)[0] if isinstance(one, Tensor)]))

        handles = [leaf.register_forward_pre_hook(note, with_kwargs=True) for leaf in self._readers()[0]]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def __call__(
        self,
        forward: Callable[[dict[str, Tensor]], Tensor],
        batch: Mapping[str, Tensor],
        calls: Sequence[Call],
        basis: SharedDirections,
        points: Sequence[Point],
    ) -> Tensor:
        """``(n, B, ...)``: the output at each of n points.

        Args:
            forward: Runs the module on a batch.
            batch: Tensors ``(B, ...)``.
            calls: As noted in a plain forward on ``batch``: one whose rows a leaf does not take as its first dimension
                could not be told from another, so in the batch all calls must be those with n times their rows. None:
                it cannot be done.
            basis: The directions.
            points: Which of them, and how far.

        Raises:
            UnbatchedError: A leaf is called in another way.
        """
        if not calls:
            raise UnbatchedError("nothing that is probed runs, or runs alike twice")
        n, examples = len(points), len(next(iter(batch.values())))
        copies = {name: tensor.repeat(n, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
        left = iter([(leaf, [(n * s[0], *s[1:]) if s else s for s in shapes]) for leaf, shapes in calls])
        leaves, tensors = self._readers()
        with _in_place_of(leaves, self._moved(tensors, basis, points), left, n):
            z = forward(copies)
        if next(left, None) is not None or len(z) != n * examples:
            raise UnbatchedError("the copies of a batch do not run as the batch alone")
        return z.unflatten(0, (n, examples))

    def _moved(
        self, tensors: dict[int, nn.Parameter], basis: SharedDirections, points: Sequence[Point]
    ) -> dict[int, Tensor]:
        """By the id of a parameter, its values at each point."""
        parameters, device = self.optimizer.parameters, self.optimizer.device
        stacks = {t: p.detach().repeat(len(points), *[1] * p.ndim) for t, p in tensors.items()}
        for i, (probe, scale) in enumerate(points):
            alpha = torch.tensor(scale, dtype=torch.float32, device=device)
            one = Displacement(parameters, basis.streams[probe], alpha)
            for t, stack in stacks.items():
                one.add_(stack[i], t)
        return {id(tensors[t]): stack for t, stack in stacks.items()}


_FUNCTORCH: Any = torch._C._functorch


@contextmanager
def _in_place_of(
    leaves: Iterable[nn.Module], moved: dict[int, Tensor], calls: Iterator[Call], n: int
) -> Iterator[None]:
    """While it is open, the leaves' forwards are those of n copies."""
    before = [(leaf, leaf.__dict__.get("forward")) for leaf in leaves]
    enabled = _FUNCTORCH._is_vmap_fallback_enabled()
    try:
        # An operation without a rule would run copy by copy, and warn.
        _FUNCTORCH._set_vmap_fallback_enabled(False)
        for leaf, _ in before:
            leaf.forward = _Leaf(leaf, moved, calls, n)
        yield
    finally:
        _FUNCTORCH._set_vmap_fallback_enabled(enabled)
        for leaf, own in before:
            leaf.__dict__.pop("forward", None)
            if own is not None:
                leaf.forward = own


class _Leaf:
    """The forward of a submodule on n copies of its rows, each with its own values of the tensors that are moved."""

    def __init__(self, leaf: nn.Module, moved: dict[int, Tensor], calls: Iterator[Call], n: int) -> None:
        self.leaf, self.forward, self.calls, self.n = leaf, leaf.forward, calls, n
        self.places = [
            (holder, name, parameter)
            for holder in leaf.modules()
            for name, parameter in holder._parameters.items()
            if parameter is not None and id(parameter) in moved
        ]
        self.stacks = [moved[id(parameter)] for _, _, parameter in self.places]
        plain = isinstance(leaf, nn.Linear) and getattr(self.forward, "__func__", None) is nn.Linear.forward
        self.product = plain and leaf.bias is None and len(self.stacks) == 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.product:
            [weight], x = self.stacks, args[0] if args else kwargs["input"]
            self._check([x])
            rows = x.reshape(self.n, -1, x.shape[-1])
            return torch.bmm(rows, weight.transpose(1, 2)).view(*x.shape[:-1], -1)
        given, spec = tree_flatten((args, kwargs))
        self._check([one for one in given if isinstance(one, Tensor)])
        given = [a.unflatten(0, (self.n, -1)) if isinstance(a, Tensor) else a for a in given]
        dims = [0 if isinstance(a, Tensor) else None for a in given]
        out = torch.vmap(partial(self._one, spec), in_dims=(0, dims), randomness="error")(self.stacks, given)
        return tree_map(lambda t: t.flatten(0, 1), out)

    def _check(self, given: list[Tensor]) -> None:
        if not given or next(self.calls, None) != (self.leaf, [tuple(t.shape) for t in given]):
            raise UnbatchedError(f"a {type(self.leaf).__name__} does not take the examples of a batch as its first "
                                 "dimension")  # fmt: skip

    def _one(self, spec: Any, values: list[Tensor], given: list[Any]) -> Any:
        args, kwargs = tree_unflatten(given, spec)
        try:
            for (holder, name, _), value in zip(self.places, values):
                holder._parameters[name] = value  # type: ignore[assignment]
            return self.forward(*args, **kwargs)
        finally:
            for holder, name, parameter in self.places:
                holder._parameters[name] = parameter
