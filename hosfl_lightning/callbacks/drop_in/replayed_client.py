"""The clients of the round, where what they hold is the part below a cut of somebody else's module."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hosfl_lightning.callbacks.drop_in.cut_check import CutError, check_gradient
from hosfl_lightning.callbacks.drop_in.lower_part import LowerPart
from hosfl_lightning.callbacks.drop_in.repeat_check import check_repeats
from hosfl_lightning.clients import Anchor, ForwardOnlyClient, LocalGradientClient
from hosfl_lightning.clients.local_gradient import Vjp
from hosfl_lightning.optim import Basis, Dense, UpdateRule, ZerothOrder
from hosfl_lightning.split.side import rows


class ReplayedClient(ForwardOnlyClient):
    """The forward-only client whose half is the lower part of somebody else's module.

    Freezes nothing and changes no mode, unlike its base: the module is the user's.

    Args:
        lower: Runs ``f_c`` again.
        rule: Update rule on θ_c.
        settings: Further arguments of `ZerothOrder`.
    """

    hint = "a replay does not repeat what it did in the batch (a cache, a counter of its own); choose another cut"

    def __init__(self, lower: LowerPart, rule: UpdateRule, settings: dict[str, Any]) -> None:
        self.lower = lower
        module: nn.Module = ([lower.module, *lower.holders])[-1]
        self.optimizer = ZerothOrder(lower.parameters.items(), rule, module=module, **settings)
        self.identity = {"client": list(lower.parameters), "rule": type(rule).__name__}
        self._checked = False

    @torch.no_grad()
    def receive(self, scale: float | None = None) -> tuple[Anchor, Tensor] | None:
        """``z`` and ``λ`` of the last backward, ``(B, S, h)``; None: λ overflowed, or a gradient to compare.

        Args:
            scale: Of the loss that was differentiated, by a GradScaler; None: there is none, and nothing overflows.
        """
        z, multiplier = self.lower.take()
        unverified = self.lower.unverified
        finite = bool(multiplier.isfinite().all()) if unverified or scale is not None else True
        if unverified and scale is not None:
            finite = finite and all(gradient.isfinite().all() for gradient in self.lower.arriving.values)
        if scale is not None and not finite:
            return None
        if unverified and finite:
            self._verify(multiplier)
        z, multiplier = _three_dimensional(z), _three_dimensional(multiplier)
        if scale is not None:
            multiplier = multiplier.float() / scale
        if not self._checked:
            self.check_replay(z)
            self._checked = True
        return Anchor(z), multiplier

    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """The lower part again, whatever the batch."""
        return _three_dimensional(self.lower.again())

    def basis(self) -> Basis:
        """Of the next step."""
        return self.optimizer.basis(self.optimizer.steps)

    def gradient(self, multiplier: Tensor) -> list[Tensor]:
        """``∂⟨λ, f_c(x; θ_c)⟩/∂θ_c`` as a replay has it, for λ of the shape of z."""
        return self.lower.vjp(multiplier)

    def _verify(self, multiplier: Tensor) -> None:
        lower, exact = self.lower, self.lower.arriving.values
        check_gradient(lower.cut, list(lower.parameters), exact, self.gradient(multiplier), self.hint)
        lower.unverified = False
        lower.arriving.remove()

    def check_replay(self, z: Tensor) -> None:
        """A replay gives z again, and layer-wise probes give what perturbing all of θ_c at once gives."""
        what = f"cut: running the part below {self.lower.cut!r} again, its output"
        check_repeats(self.optimizer, lambda: self.evaluate({}), z, what, CutError)


class ReplayedLocalClient(ReplayedClient, LocalGradientClient):
    """The client that knows the gradient of its side adapter, likewise; the whole gradient is its answer.

    Args:
        lower: Runs ``f_c`` again; θ_c is a side adapter that ends at the cut.
        rule: Update rule on θ_c.
        settings: Further arguments of `ZerothOrder`.

    Raises:
        CutError: There is no side adapter, or other parameters are trained as well.
    """

    hint = "the side adapter does not end at the cut, or something below it is not repeated; cut where the adapter ends"

    def __init__(self, lower: LowerPart, rule: UpdateRule, settings: dict[str, Any]) -> None:
        super().__init__(lower, rule, {**settings, "estimator": "forward"})  # of an optimizer that probes nothing
        try:
            self.find_side(lower.module)
        except ValueError as error:
            raise CutError("estimator='local' needs a side adapter below the cut (hosfl_lightning.split.side."
                           "attach_side); attach one, or take estimator='forward'") from error  # fmt: skip
        beside = [name for i, name in enumerate(lower.parameters) if i in (self.optimizer.probed or ())]
        if beside:
            raise CutError(f"estimator='local' knows the gradient of the side adapter alone, and {beside[0]} is "
                           "trained below the cut too; freeze it, or take estimator='forward'")  # fmt: skip

    def basis(self) -> Dense:
        """The gradient itself."""
        return Dense([p.numel() for p in self.optimizer.parameters])

    def gradient(self, multiplier: Tensor) -> list[Tensor]:
        """The known gradient."""
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in self.optimizer.parameters]
        factor = _three_dimensional(multiplier)
        self._add_gradients_([totals], {}, Anchor(factor), factor, [slice(0, len(factor))])
        return totals

    def check_replay(self, z: Tensor) -> None:
        """Nothing is probed."""

    def _recompute(self, vjp: Vjp, batch: dict[str, Tensor], examples: int) -> None:
        # A call of the user's is made again as it was made, whole.
        with self.ladder.watching(partial(vjp, 0)):
            self.evaluate(batch)


def _three_dimensional(tensor: Tensor) -> Tensor:
    """``(B, …, h)`` as ``(B, S, h)``, the shape of a round's messages; of a map ``(B, h, H, W)`` the pixels."""
    if tensor.dim() == 4:
        return rows(tensor)
    return tensor.reshape(len(tensor), -1, tensor.shape[-1] if tensor.dim() > 1 else 1)
