"""Ways to estimate ∂⟨λ, f(x; θ)⟩/∂θ by forwards alone, each at eight a round beside the one that gives z."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARDS = 8
MU = 1e-2


@dataclass
class Term:
    """``t(θ) = ⟨λ, f(x; θ)⟩`` of a round's examples, client after client.

    Args:
        half: ``f``, of θ (d,) and examples.
        x: All clients' examples (K·B, …).
        multiplier: λ, as f's output.
        z: f at the θ of the round's start.
        clients: K.
    """

    half: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    multiplier: Tensor
    z: Tensor
    clients: int

    def at(self, theta: Tensor) -> Tensor:
        """(K,) fp64, every client's."""
        return self._dot(self.half(theta, self.x))

    def start(self) -> Tensor:
        """(K,) fp64, of z, which costs no forward."""
        return self._dot(self.z)

    def of_client(self, client: int, theta: Tensor) -> Tensor:
        """One client's; K of these cost what one `at` does."""
        own = slice(client * len(self.x) // self.clients, (client + 1) * len(self.x) // self.clients)
        return (self.multiplier[own].double() * self.half(theta, self.x[own]).double()).sum()

    def _dot(self, z: Tensor) -> Tensor:
        return (self.multiplier.double() * z.double()).view(self.clients, -1).sum(1)


@dataclass
class Draw:
    """Random directions of ``d`` elements, each of squared norm d."""

    d: int
    generator: torch.Generator

    def signs(self, number: int) -> Tensor:
        """(number, d) of ±1."""
        return torch.randint(0, 2, (number, self.d), generator=self.generator).float() * 2 - 1

    def orthogonal(self, number: int, first: Tensor | None = None) -> Tensor:
        """(number, d), at right angles; the first along ``first``."""
        columns = torch.randn(self.d, number, generator=self.generator)
        if first is not None:
            columns[:, 0] = first
        return torch.linalg.qr(columns)[0].T * math.sqrt(self.d)


@dataclass
class Known:
    """What an estimator may know beside the round.

    Attributes:
        momentum: AdamW's first moment; zero at the start.
        subspace: (16, d), an orthonormal basis of gradients on the server's public examples at the start.
        step: Moves θ by AdamW with an estimate.
    """

    momentum: Tensor
    subspace: Tensor
    step: Callable[[Tensor, Tensor], Tensor]


Estimator = Callable[[Term, Tensor, Draw, Known], Tensor]


def along(term: Term, theta: Tensor, directions: Tensor, base: Tensor | None = None) -> Tensor:
    """(P,) one-sided differences of the sum over clients."""
    start = (term.start() if base is None else base).sum()
    return torch.stack([(term.at(theta + MU * u).sum() - start) / MU for u in directions]).float()


def mean_along(term: Term, theta: Tensor, directions: Tensor, base: Tensor | None = None) -> Tensor:
    """``(1/P) Σ_p v_p u_p``."""
    return along(term, theta, directions, base) @ directions / len(directions)


def plain(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """HO-SFL's: eight signs."""
    return mean_along(term, theta, draw.signs(FORWARDS))


def four_times(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """Not at equal forwards: thirty-two signs."""
    return mean_along(term, theta, draw.signs(4 * FORWARDS))


def orthogonal(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """Eight directions at right angles."""
    return mean_along(term, theta, draw.orthogonal(FORWARDS))


def antithetic(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """Both sides of four signs."""
    directions = draw.signs(FORWARDS // 2)
    sides = [[term.at(theta + scale * u).sum() for scale in (MU, -MU)] for u in directions]
    return torch.stack([(up - down) / (2 * MU) for up, down in sides]).float() @ directions / len(directions)


def own(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """Every client eight signs of its own: as many forwards and scalars up, K times as many scalars down."""
    return _own(term, theta, draw.signs)


def own_orthogonal(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """The two before together."""
    return _own(term, theta, draw.orthogonal)


def _own(term: Term, theta: Tensor, directions: Callable[[int], Tensor]) -> Tensor:
    total, start = torch.zeros_like(theta), term.start()
    for client in range(term.clients):
        mine = directions(FORWARDS)
        values = [(term.of_client(client, theta + MU * u) - start[client]) / MU for u in mine]
        total += torch.stack(values).float() @ mine / FORWARDS
    return total


def momentum(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """The past update as one direction, exact along it, and seven at right angles, scaled to be unbiased."""
    if not known.momentum.any():
        return orthogonal(term, theta, draw, known)
    directions = draw.orthogonal(FORWARDS, known.momentum)
    values = along(term, theta, directions)
    d = len(theta)
    return values[0] * directions[0] / d + (values[1:] @ directions[1:]) / (FORWARDS - 1) * (d - 1) / d


def blocks(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """FedSPZO's: five probes of the first half of θ, three of the second."""
    directions, half, first = draw.signs(FORWARDS), len(theta) // 2, 5
    directions[:first, half:] = 0
    directions[first:, :half] = 0
    values = along(term, theta, directions)
    scale = torch.tensor([1 / first] * first + [1 / (FORWARDS - first)] * (FORWARDS - first))
    return (values * scale) @ directions


def subspace(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """CooperLLM's: signs within sixteen directions that the server's public examples gave."""
    signs = Draw(len(known.subspace), draw.generator).signs(FORWARDS)
    return mean_along(term, theta, signs @ known.subspace)


def stale(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """Two steps at the same λ, of four probes and of three; the first is taken here."""
    moved = known.step(theta, mean_along(term, theta, draw.signs(4)))
    theta.copy_(moved)
    return mean_along(term, theta, draw.signs(3), term.at(theta))


def exact(term: Term, theta: Tensor, draw: Draw, known: Known) -> Tensor:
    """A control: backprop on the same values."""
    with torch.enable_grad():
        leaf = theta.clone().requires_grad_()
        [gradient] = torch.autograd.grad((term.multiplier * term.half(leaf, term.x)).sum(), leaf)
    return gradient


PLAIN = "eight signs, as published"
ESTIMATORS: dict[str, Estimator] = {
    PLAIN: plain,
    "orthogonal": orthogonal,
    "antithetic": antithetic,
    "own directions a client": own,
    "own and orthogonal": own_orthogonal,
    "past update as a direction": momentum,
    "five and three for two blocks": blocks,
    "public subspace of 16": subspace,
    "two steps at one λ": stale,
    "32 signs (4 times the forwards)": four_times,
    "control: backprop, same values": exact,
}
