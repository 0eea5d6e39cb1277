"""Can what user code computes be probed? Looked at on the first batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from hosfl_lightning.optim import ZerothOrder
from hosfl_lightning.optim.probing import UnseenProbeError


@torch.no_grad()
def check_repeats(
    optimizer: ZerothOrder,
    evaluate: Callable[[], Tensor],
    before: Tensor,
    what: str,
    error: type[ValueError] = ValueError,
) -> float:
    """It repeats itself, and layer-wise probes give what moving all of θ at once gives.

    Where a layer-wise probe misses a parameter, warns and makes the optimizer move all at once.

    Args:
        optimizer: Probes its module layer by layer; changed in that only.
        evaluate: Runs it again, from the random state of the first time.
        before: What the first time gave.
        what: That it is run again, and what must stay the same, in words.
        error: Raised if it does not.

    Returns:
        By how much a probe changes it, ``‖·‖₂``.

    Raises:
        ValueError: It does not stay the same, by more than a tenth of what a probe changes.
    """
    basis = optimizer.basis(optimizer.steps)
    unmoved = evaluate()
    seen = False
    with suppress(UnseenProbeError):
        with optimizer.perturbed(basis, 0, optimizer.mu):
            layerwise = evaluate()
        if torch.equal(layerwise, unmoved):
            optimizer.check_seen(evaluate, basis)
        seen = True
    module, optimizer.module = optimizer.module, None
    with optimizer.perturbed(basis, 0, optimizer.mu):
        moved = evaluate()
    drift, effect = (float((other.double() - before.double()).norm()) for other in (unmoved, moved))
    if drift > 0.1 * effect:
        raise error(
            f"{what} changes by {drift:.1e}, under a probe by {effect:.1e}; it must depend on nothing but the batch "
            "and torch's random state (no numpy or random, no work in place on the batch, no state of its own)"
        )
    if torch.equal(layerwise, moved):
        optimizer.module = module if seen else None
        return effect
    size = sum(p.numel() * p.element_size() for p in optimizer.parameters)
    warnings.warn(
        "a parameter that is probed is used outside the forward of the module that owns it, so probes perturb all of "
        f"them at once and keep a copy ({size} bytes)",
        stacklevel=2,
    )
    return effect
