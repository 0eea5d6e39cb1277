r"""Gradients of both halves over a few dozen rounds' batches, and what can be said of their mean.

With ``g_b`` of batch ``b = 1..B``, independent, of mean ``G`` and covariance ``Σ``:

    ‖G‖²      ← Σ_{b≠b'} ⟨g_b, g_b'⟩ / B(B−1)          unbiased; ‖ḡ‖² exceeds it by tr Σ / B
    tr Σ      ← Σ_b ‖g_b‖² / B − ‖G‖²
    decrease  ← η ‖G‖²                                  of a step of SGD
              ← η ⟨m_A / √v_A, ḡ_B⟩                     of Adam: halves A and B of the batches, and the other way round
    share     = client's / (client's + server's)

What is measured on one half of the batches and used on the other has no bias from their noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hosfl_lightning.callbacks.gradient_alignment import client_gradient
from hosfl_lightning.clients import Client
from hosfl_lightning.clients.cohort import Cohort
from hosfl_lightning.clients.vectors import flat
from hosfl_lightning.models import SplitModule
from hosfl_lightning.server.server import loss_of
from hosfl_lightning.split import run

#: Bootstrap resamples, and what keeps Adam's quotient finite, as its own ε.
RESAMPLES, EPSILON = 200, 1e-8


@dataclass(frozen=True)
class Smashed:
    """What the server made of the rounds' batches.

    Attributes:
        batches: Inputs of each round, on the device.
        multipliers: ``∂L/∂z`` of each, clients' weights in it.
        server: ``g_b`` of the server, ``(B, d_s)`` fp32.
        examples: Of a round, on average.
    """

    batches: list[dict[str, Tensor]]
    multipliers: list[Tensor]
    server: Tensor
    examples: float


def server_gradients(trainer: Any, model: SplitModule, cohorts: Sequence[Cohort]) -> Smashed:
    """One forward and backward of the server a batch, which is left as it is."""
    batches, multipliers, gradients = [], [], []
    parameters = list(model.server_parameters.values())
    for cohort in cohorts:
        batch = trainer.to_device(cohort.batch)
        with trainer.fabric.autocast(), torch.enable_grad():
            with torch.no_grad():
                z = run(model.client_half, batch)
            z.requires_grad_()
            smashed = {"z": z, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
            loss = loss_of(model.training_step(smashed, 0))
        multiplier, *own = torch.autograd.grad(loss, [z, *parameters], materialize_grads=True)
        batches.append(batch)
        multipliers.append(multiplier)
        gradients.append(flat(own))
    examples = sum(cohort.num_examples for cohort in cohorts) / len(cohorts)
    return Smashed(batches, multipliers, torch.stack(gradients), examples)


def client_gradients(trainer: Any, client: Client, smashed: Smashed) -> Tensor:
    """``g_b`` of a client, ``(B, d_c)`` fp32; it is left as it is."""
    with trainer.fabric.autocast():
        return torch.stack([flat(client_gradient(client, *pair)) for pair in zip(smashed.batches, smashed.multipliers)])


def squared_norm(gram: Tensor, counts: Tensor | None = None) -> float:
    """``‖G‖²`` without bias.

    Args:
        gram: ``⟨g_b, g_b'⟩``, ``(B, B)`` fp64.
        counts: ``(B,)``, how often a resample has each batch, which is never paired with itself; None: once.
    """
    weight = torch.ones(len(gram), dtype=torch.float64) if counts is None else counts.double()
    pairs = torch.outer(weight, weight).fill_diagonal_(0)
    return float((gram * pairs).sum() / pairs.sum())


def gram_of(gradients: Tensor) -> Tensor:
    """``⟨g_b, g_b'⟩``, ``(B, B)`` fp64."""
    wide = gradients.double()
    return wide @ wide.T


def noise_scale(gradients: Tensor, examples: float) -> float | None:
    """``n tr Σ / ‖G‖²``: the examples in a round at which noise and signal are equal; None: no signal is seen.

    Reference: McCandlish et al. 2018, arXiv 1812.06162.
    """
    gram = gram_of(gradients)
    norm = squared_norm(gram)
    spread = float(gram.trace()) / len(gram) - norm
    return examples * spread / norm if norm > 0 else None


@dataclass(frozen=True)
class Rule:
    """How a half moves.

    Attributes:
        adaptive: Divides by the root of the mean square, as Adam does.
        lr: ``η``.
    """

    adaptive: bool
    lr: float

    @classmethod
    def of(cls, rule: Any, lr: float) -> Rule:
        """Of an optimizer of torch's or of this package; what is not Adam's kind counts as SGD."""
        return cls("adam" in type(rule).__name__.lower(), lr)


def decreases(gradients: Tensor, rule: Rule, counts: Tensor) -> Tensor:
    """Predicted by the gradient alone, of one step of a half: of each resample.

    Args:
        gradients: ``(B, d)``.
        rule: Of the half.
        counts: ``(N, B)``: how often each of N resamples has each batch.

    Returns:
        ``(N,)`` fp64.
    """
    if rule.adaptive:
        found = [_of_adam(gradients, row) for row in counts]
    else:
        gram = gram_of(gradients)
        found = [squared_norm(gram, row) for row in counts]
    return rule.lr * torch.tensor(found, dtype=torch.float64)


def _of_adam(gradients: Tensor, counts: Tensor) -> float:
    parts = [(gradients[start::2], counts[start::2]) for start in (0, 1)]
    means = [w @ g / w.sum() for g, w in parts]
    steps = [mean / ((w @ g.square() / w.sum()).sqrt() + EPSILON) for mean, (g, w) in zip(means, parts)]
    return float(steps[0] @ means[1] + steps[1] @ means[0]) / 2


def resamples(batches: int, seed: int = 0) -> Tensor:
    """``(1 + RESAMPLES, batches)`` counts, first each batch once; even and odd ones are drawn apart, and stay so."""
    generator, counts = torch.Generator().manual_seed(seed), torch.zeros(RESAMPLES, batches)
    for start in (0, 1):
        places = torch.arange(start, batches, 2)
        drawn = places[torch.randint(len(places), (RESAMPLES, len(places)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
    return torch.cat([torch.ones(1, batches), counts])


def interval(values: Tensor) -> tuple[float, float]:
    """2.5th and 97.5th percentile of what is a number."""
    low, high = values.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def shares(client: Tensor, server: Tensor) -> Tensor:
    """Of the decrease below the cut, by resample; a half of which no decrease is seen counts nothing."""
    client, server = client.clamp(min=0), server.clamp(min=0)
    return torch.where(client + server > 0, client / (client + server), torch.nan)
