"""Step 3 of a round: forward, backward, λ back, and one optimizer step once the clients have answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from hashlib import blake2b
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from hosfl_lightning.padding import FILL, stack_rows
from hosfl_lightning.servers.base import SplitModule
from hosfl_lightning.servers.pretrained import seeded
from hosfl_lightning.wire import Multiplier, SmashedData

Part = tuple[Tensor, Tensor, Tensor]
"""What one client sent, unpacked: ``z (B, S, h)``, labels, ``mask (B, S)``."""


class Sums(Protocol):
    """Sums over a round's clients, in their order, wherever they are."""

    def total(self, terms: Sequence[int]) -> int:
        """``Σ_k n_k`` over all processes, from the loss terms of each of this one's groups."""

    def add(self, loss: Tensor | None) -> None:
        """Take in the ``w_k ℓ_k`` of the group whose gradients are in ``.grad`` now; None: it has no loss term."""

    def finish(self) -> Tensor:
        """``Σ_k w_k ℓ_k``, 0-d; ``.grad`` holds the sum of all groups' gradients."""


class Server:
    r"""Descends ``Σ_k w_k ℓ_k(f_s(z_k; θ_s), y_k)`` and returns ``λ_k = ∂ℓ_k/∂z_k``, unweighted.

    The clients of a group run as one batch: the mean over its terms is the weighted mean of its clients' means, so
    weights enter once. λ_k is what autograd leaves in ``z_k`` divided by ``w_k``. Gradients of several groups are
    summed in order. A step is `backward`, then `step`: one that fails between them leaves θ_s as it was. A round is one
    step, or several, and ends with `end_round`.

    Args:
        module: Whose ``training_step`` is the loss.
        fabric: Precision, device and backward.
        optimizer: Over θ_s.
        scheduler: Stepped once a round, or None.
        gradient_clip_val: Largest 2-norm of the server's gradient, or None.
        seed: Of the adapters' dropout masks and of the multipliers' stochastic rounding.
        call: Fires a Trainer hook.
        sums: Makes the `Sums` of a round over the given parameters.
        codec: In what λ travels.
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
        sums: Callable[[list[nn.Parameter]], Sums],
        codec: str = "fp32",
    ) -> None:
        self.module, self.fabric = module, fabric
        self.optimizer, self.scheduler = optimizer, scheduler
        self.gradient_clip_val, self.seed, self.call = gradient_clip_val, seed, call
        self.sums, self.codec = sums, codec

    def num_terms(self, message: SmashedData) -> int:
        """``n_k``, counted from the client's labels."""
        return self.module.count(message.unpack_labels())

    def backward(self, groups: Sequence[Sequence[SmashedData]], step: int = 0) -> tuple[Tensor, list[list[Multiplier]]]:
        """Gradients and multipliers of a step's smashed data.

        Args:
            groups: Messages that run as one batch each; ascending client ids over all of them. A group may be empty; at
                least one client has a loss term.
            step: Which of the round's, where a client takes several.

        Returns:
            ``Σ_k w_k ℓ_k`` (0-d, detached) and each client's λ, grouped as it came.
        """
        received = [[message.unpack() for message in group] for group in groups]
        terms = [[self.num_terms(message) for message in group] for group in groups]
        self.call("on_before_zero_grad", optimizer=self.optimizer)
        self.optimizer.zero_grad()
        sums = self.sums(list(self.module.server_parameters.values()))
        total = sums.total([sum(counts) for counts in terms])
        multipliers = []
        for group, parts, counts in zip(groups, received, terms):
            w = [count / total for count in counts]
            loss, gradients = self._backward(parts, sum(w), group[0], step) if any(w) else (None, _zeros(parts))
            sums.add(loss)
            multipliers.append(list(self._multipliers(group, gradients, w, step)))
        return sums.finish(), multipliers

    @torch.no_grad()
    def loss(self, message: SmashedData) -> Tensor:
        """``ℓ_k(f_s(z_k; θ_s), y_k)``, 0-d fp64: a forward alone, without dropout."""
        z, labels, mask = message.unpack()
        with self.fabric.autocast():
            return loss_of(self.module.training_step(self._batch(z, labels, mask), message.round)).double()

    def step(self) -> None:
        """One optimizer step on what `backward` has left."""
        if self.gradient_clip_val is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.gradient_clip_val)
        self.call("on_before_optimizer_step", optimizer=self.optimizer)
        self.optimizer.step()

    def end_round(self) -> None:
        """The learning rate of the next round."""
        if self.scheduler is not None:
            self.scheduler.step()

    def state(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Copies of θ_s and of the optimizer's state."""
        parameters = [p.detach().clone() for p in self.module.server_parameters.values()]
        return parameters, deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def put(self, parameters: Sequence[Tensor], optimizer: dict[str, Any]) -> None:
        """Go on from a `state`."""
        for mine, given in zip(self.module.server_parameters.values(), parameters):
            mine.copy_(given)
        self.optimizer.load_state_dict(deepcopy(optimizer))

    def _backward(
        self, parts: Sequence[Part], share: float, first: SmashedData, step: int
    ) -> tuple[Tensor, list[Tensor]]:
        zs, ys, masks = zip(*parts)
        batch = self._batch(stack_rows(zs), stack_rows(ys, FILL["labels"]), stack_rows(masks))
        z = batch["z"].requires_grad_()
        # Dropout masks are a function of (seed, round, step, group), so a resumed run draws the same ones.
        named = f"{self.seed}/{first.round}/{step}/{first.client}"
        seed = int.from_bytes(blake2b(named.encode(), digest_size=8).digest(), "little") >> 1
        with self.module.dropout_active(), seeded(seed, z.device), torch.enable_grad(), self.fabric.autocast():
            loss = loss_of(self.module.training_step(batch, first.round)) * share
        self.call("on_before_backward", loss=loss)
        self.fabric.backward(loss)
        self.call("on_after_backward")
        assert z.grad is not None
        rows = z.grad.split([len(part) for part in masks])
        return loss.detach(), [row[:, : mask.shape[1]] for row, mask in zip(rows, masks)]

    def _batch(self, z: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        batch = {"z": z, "attention_mask": mask.long(), "labels": labels}
        return {name: tensor.to(self.fabric.device) for name, tensor in batch.items()}

    def _multipliers(
        self, group: Sequence[SmashedData], gradients: Sequence[Tensor], w: Sequence[float], step: int
    ) -> Iterator[Multiplier]:
        for message, gradient, weight in zip(group, gradients, w):
            # A client without a single loss term has weight 0 and λ = 0.
            multiplier = gradient / weight if weight else gradient
            yield Multiplier.pack(message.round, message.client, multiplier, message.mask, self.codec, self.seed, step)


def _zeros(parts: Sequence[Part]) -> list[Tensor]:
    return [torch.zeros_like(z) for z, _, _ in parts]


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
