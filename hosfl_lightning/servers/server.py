"""Step 3 of a round: forward, backward, one optimizer step, and λ back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from hosfl_lightning.aggregation import weights
from hosfl_lightning.padding import FILL, stack_rows
from hosfl_lightning.servers.base import SplitModule
from hosfl_lightning.servers.pretrained import seeded
from hosfl_lightning.wire import Multiplier, SmashedData

Part = tuple[Tensor, Tensor, Tensor]
"""What one client sent, unpacked: ``z (B, S, h)``, labels, ``mask (B, S)``."""


class Server:
    r"""Descends ``Σ_k w_k ℓ_k(f_s(z_k; θ_s), y_k)`` and returns ``λ_k = ∂ℓ_k/∂z_k``, unweighted.

    The clients of a group run as one batch: the mean over its terms is the weighted mean of its clients' means, so
    weights enter once. λ_k is what autograd leaves in ``z_k`` divided by ``w_k``. Gradients of several groups are
    summed in order.

    Args:
        module: Whose ``training_step`` is the loss.
        fabric: Precision, device and backward.
        optimizer: Over θ_s.
        scheduler: Stepped once a round, or None.
        gradient_clip_val: Largest 2-norm of the server's gradient, or None.
        seed: Of the adapters' dropout masks.
        call: Fires a Trainer hook.
    """

    def __init__(
        self,
        module: SplitModule,
        fabric: Fabric,
        optimizer: torch.optim.Optimizer,
        scheduler: Any | None,
        gradient_clip_val: float | None,
        seed: int,
        call: Callable[..., None],
    ) -> None:
        self.module, self.fabric = module, fabric
        self.optimizer, self.scheduler = optimizer, scheduler
        self.gradient_clip_val, self.seed, self.call = gradient_clip_val, seed, call

    def step(self, groups: Sequence[Sequence[SmashedData]]) -> tuple[Tensor, list[list[Multiplier]]]:
        """One optimizer step on the smashed data of a round.

        Args:
            groups: Messages that run as one batch each; ascending client ids over all of them.

        Returns:
            ``Σ_k w_k ℓ_k`` (0-d, detached) and each client's λ, grouped as it came.
        """
        received = [[message.unpack() for message in group] for group in groups]
        w = iter(weights([self.module.count(labels) for parts in received for _, labels, _ in parts]))
        self.call("on_before_zero_grad", optimizer=self.optimizer)
        self.optimizer.zero_grad()
        total, multipliers = torch.zeros((), device=self.fabric.device), []
        for group, parts in zip(groups, received):
            share = [next(w) for _ in group]
            loss, gradient = self._backward(parts, sum(share), group[0])
            total = total + loss
            multipliers.append(list(_multipliers(group, gradient, share)))
        if self.gradient_clip_val is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.gradient_clip_val)
        self.call("on_before_optimizer_step", optimizer=self.optimizer)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return total, multipliers

    def _backward(self, parts: Sequence[Part], share: float, first: SmashedData) -> tuple[Tensor, Tensor]:
        zs, ys, masks = zip(*parts)
        z = stack_rows(zs).to(self.fabric.device).requires_grad_()
        if not share:  # no loss term in the whole group: its mean would be 0 / 0
            return torch.zeros((), device=z.device), torch.zeros_like(z)
        labels, mask = stack_rows(ys, FILL["labels"]), stack_rows(masks)
        batch = {"z": z, "attention_mask": mask.long().to(z.device), "labels": labels.to(z.device)}
        # Dropout masks are a function of (seed, round, group), so a resumed run draws the same ones.
        seed = (self.seed * 1_000_003 + first.round * 1_009 + first.client) % 2**63
        with self.module.dropout_active(), seeded(seed, z.device), torch.enable_grad(), self.fabric.autocast():
            loss = loss_of(self.module.training_step(batch, first.round)) * share
        self.call("on_before_backward", loss=loss)
        self.fabric.backward(loss)
        self.call("on_after_backward")
        assert z.grad is not None
        return loss.detach(), z.grad


def loss_of(output: Any) -> Tensor:
    """The loss of what a ``training_step`` may return: a tensor, or a dictionary with ``loss``."""
    return output["loss"] if isinstance(output, dict) else output


def configured(module: SplitModule) -> tuple[torch.optim.Optimizer, Any | None]:
    """The server's optimizer and its schedule, from what ``configure_optimizers`` may return.

    Raises:
        ValueError: More than one optimizer, or a schedule that is not stepped once a round.
    """
    config: Any = module.configure_optimizers()
    if isinstance(config, tuple) and len(config) == 2 and all(isinstance(part, list) for part in config):
        (optimizer, *others), schedules = config
    elif isinstance(config, dict):
        optimizer, others, schedules = config["optimizer"], [], [config.get("lr_scheduler")]
    else:
        optimizer, others, schedules = config, [], []
    schedule = schedules[0] if schedules else None
    settings = schedule if isinstance(schedule, dict) else {"scheduler": schedule}
    if others or not isinstance(optimizer, torch.optim.Optimizer) or len(schedules) > 1:
        raise ValueError(f"{type(module).__name__}.configure_optimizers: the server has one optimizer and one schedule")
    if (
        isinstance(settings["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau)
        or settings.get("frequency", 1) != 1
        or settings.get("interval", "step") != "step"
    ):
        raise ValueError(
            "model.init_args.lr_scheduler: the server's schedule is stepped once a round, without a metric; "
            "use one with interval 'step' and frequency 1"
        )
    return optimizer, settings["scheduler"]


def _multipliers(group: Sequence[SmashedData], gradient: Tensor, w: Sequence[float]) -> Iterator[Multiplier]:
    row = 0
    for message, weight in zip(group, w):
        examples, width = message.mask.shape
        mine = gradient[row : row + examples, :width]
        row += examples
        # A client without a single loss term has weight 0 and λ = 0.
        yield Multiplier.pack(message.round, message.client, mine / weight if weight else mine, message.mask)
