"""What an exported half is worth: its z beside PyTorch's, and its probes beside the exact derivative."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from hosfl_lightning.device.extra import device_extra
from hosfl_lightning.device.samples import Batch, Samples, counted
from hosfl_lightning.rng import Domain, Stream, add_direction_
from hosfl_lightning.split import run

with device_extra():
    from hosfl_client.half import OnnxHalf

#: Directions whose derivatives are compared, and tokens of the batch.
DIRECTIONS, EXAMPLES, TOKENS = 16, 4, 32


def measure(path: Path, half: Any, trained: Mapping[str, Tensor], samples: Samples, mu: float) -> dict[str, Any]:
    r"""Plain values: ``z``, ``[batch, max |Δz|, max |Δz| / max |z|]`` at positions that count, and ``probes``.

    ``probes`` is the correlation, over random directions u, of ``⟨λ, z(θ + μu) − z(θ)⟩/μ`` of the written half with
    ``⟨∇⟨λ, z⟩, u⟩`` of PyTorch's, λ a Gaussian.

    Args:
        path: The written graph.
        half: PyTorch's, fp32.
        trained: θ_c by name.
        samples: What it takes.
        mu: μ.
    """
    exported = OnnxHalf(path)
    rows = []
    for name, batch in samples.six().items():
        with torch.no_grad():
            z = run(half, batch)
        there = torch.from_numpy(exported.forward(as_arrays(batch)))
        counts = counted(batch, z)
        difference = float((there - z)[counts].abs().max())
        rows.append([name, difference, difference / float(z[counts].abs().max())])
    batch = samples.batch(EXAMPLES, min(TOKENS, samples.longest))
    return {"z": rows, "probes": correlation(exported, half, trained, batch, mu), "mu": mu}


def correlation(exported: OnnxHalf, half: Any, trained: Mapping[str, Tensor], batch: Batch, mu: float) -> float | None:
    """Of the probes' derivatives with the exact ones; None: these are all alike."""
    if not trained:
        return None
    exact, multiplier = gradient(half, trained, batch)
    arrays = as_arrays(batch)
    base = inner(multiplier, exported.forward(arrays))
    probed, known = [], []
    for number in range(DIRECTIONS):
        u = direction(trained, number)
        with exported.perturbed(lambda i, theta, u=u: theta + np.float32(mu) * u[i]):  # type: ignore[misc]
            probed.append((inner(multiplier, exported.forward(arrays)) - base) / float(np.float32(mu)))
        known.append(sum(float(np.vdot(g.astype(np.float64), d)) for g, d in zip(exact, u)))
    if not np.std(known):
        return None
    if not np.std(probed):  # lost in rounding
        return 0.0
    return float(np.corrcoef(probed, known)[0, 1])


def gradient(half: Any, trained: Mapping[str, Tensor], batch: Batch) -> tuple[list[Any], Any]:
    """``∇_θ ⟨λ, z⟩`` of each tensor by backprop, and λ ``(B, S, h)``: Gaussian, zero where nothing counts."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in trained.items()}
    z = functional_call(half, leaves, tuple(batch[name] for name in half.inputs))
    multiplier = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)) * counted(batch, z)[..., None]
    found = torch.autograd.grad((z * multiplier).sum(), [*leaves.values()], allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves.values())]
    return [g.numpy() for g in gradients], multiplier.numpy()


def direction(trained: Mapping[str, Tensor], probe: int) -> list[Any]:
    """±1 for every element, as a run's directions are."""
    found = []
    for number, tensor in enumerate(trained.values()):
        u = torch.zeros(tensor.numel())
        add_direction_(u, 1.0, Stream(0, Domain.RADEMACHER, probe=probe), number)
        found.append(u.view(tensor.shape).numpy())
    return found


def inner(multiplier: Any, z: Any) -> float:
    """``⟨λ, z⟩`` in fp64."""
    return float(np.vdot(multiplier.astype(np.float64), z.astype(np.float64)))


def as_arrays(batch: Batch) -> dict[str, Any]:
    """The same in numpy."""
    return {name: tensor.numpy() for name, tensor in batch.items()}
