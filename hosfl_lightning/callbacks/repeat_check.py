"""Can a step that user code computes be probed? Looked at on the first batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from hosfl_lightning.optim import ZerothOrder


@torch.no_grad()
def check_repeats(optimizer: ZerothOrder, objective: Callable[[], Tensor], loss: Tensor) -> None:
    """The step repeats itself, μ is felt, and layer-wise probes give what moving all of θ at once gives.

    Warns where μ is not felt. Where a probe misses a parameter, warns and makes the optimizer move all at once.

    Args:
        optimizer: Probes its module layer by layer; changed in that only.
        objective: Runs the step again, from the random state of the first time.
        loss: What the first time gave, 0-d.

    Raises:
        ValueError: Another loss than the first time, by more than a tenth of what a probe changes.
    """
    basis = optimizer.basis(optimizer.steps)
    unmoved = objective()
    with optimizer.perturbed(basis, 0, optimizer.mu):
        layerwise = objective()
    module, optimizer.module = optimizer.module, None
    with optimizer.perturbed(basis, 0, optimizer.mu):
        moved = objective()
    drift, effect = (float((other.double() - loss.double()).abs()) for other in (unmoved, moved))
    if drift > 0.1 * effect:
        raise ValueError(
            f"running training_step again on a batch changes its loss by {drift:.1e}, a probe by {effect:.1e}; it must "
            "depend on nothing but the batch and torch's random state (no numpy or random, no work in place on the "
            "batch, no state of its own)"
        )
    if not effect:
        warnings.warn(
            f"mu={optimizer.mu:g} does not change the loss in {loss.dtype}: raise mu, or compute it in a wider dtype",
            stacklevel=2,
        )
    if torch.equal(layerwise, moved):
        optimizer.module = module
        return
    size = sum(p.numel() * p.element_size() for p in optimizer.parameters)
    warnings.warn(
        "a parameter is used outside the forward of the module that owns it, so probes perturb all of them at once and "
        f"keep a copy ({size} bytes)",
        stacklevel=2,
    )
