"""ZerothOrderTraining: a plain Trainer trains a whole module by forward evaluations alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from typing_extensions import override

from hosfl_lightning.callbacks.drop_in import trainer_check
from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder
from hosfl_lightning.callbacks.drop_in.repeat_check import check_repeats
from hosfl_lightning.callbacks.drop_in.resumed import check_loaded, resume
from hosfl_lightning.callbacks.drop_in.schedule import Policy, Schedule, check_policy
from hosfl_lightning.callbacks.drop_in.silence import replaced, silenced
from hosfl_lightning.optim import SGD, Estimator, SharedDirections, UpdateRule, ZerothOrder
from hosfl_lightning.optim.estimators import told
from hosfl_lightning.optim.growth import Growth, SilentProbes
from hosfl_lightning.optim.probing import UnseenProbeError
from hosfl_lightning.optim.randomness import Evaluations, SameRandomness
from hosfl_lightning.optim.zeroth_order import check_probe_settings
from hosfl_lightning.server.server import loss_of


class ZerothOrderTraining(Callback):
    r"""Forward evaluations in the place of backprop, in a ``lightning.Trainer`` with automatic optimization (MeZO).

    ::

        v_p = (ℓ(θ + μ u_p) − ℓ(θ − μ u_p)) / 2μ,  p = 1..P          central; forward: (ℓ(θ + μ u_p) − ℓ(θ)) / μ
        ĝ = (1/P) Σ_p v̄_p u_p,  θ ← rule(θ, ĝ)                       v̄_p: mean over ranks

    θ is what the module's own optimizer would train. No ``.grad`` and no graph is made: the memory is that of
    inference, and the estimate as good as ``√(P/d)``, its cosine with the gradient. The numerics are `ZerothOrder`'s.

    Example::

        Trainer(callbacks=[ZerothOrderTraining(rule=SGD(lr=1e-6))]).fit(model, data)

    The module is written as ever. ``training_step`` runs once a forward: the first counts, the others replay torch's
    random state with ``self.log`` and metrics silenced. What else it does happens once a forward: what it appends,
    counts, or hands to ``self.logger`` belongs in ``on_train_batch_end``, from ``outputs``.

    | estimator | forwards | what is logged in ``training_step`` | loss in ``outputs`` |
    |---|---|---|---|
    | central | ``2P`` | at ``θ + μ u_1``, as MeZO's | mean of all forwards, ``ℓ(θ) + O(μ²)`` |
    | central, norm statistics in the module | ``2P + 1`` | at ``θ``, as those | ``ℓ(θ)`` |
    | forward | ``P + 1`` | at ``θ`` | ``ℓ(θ)`` |

    Trainer goes on to step the module's optimizer, which finds no gradient and lends its schedule only: the learning
    rate of a parameter group is the rule's, times the group's own over the peak of its schedule (see `Schedule`). So
    schedulers, hooks, ``global_step``, checkpoints and resuming work as without it. The first batch costs four more
    forwards and a copy of θ, to see that ``training_step`` repeats itself.

    Under DDP ranks exchange ``P`` scalars a step; DDP's own wrapper is left away, so norm statistics stay each rank's.

    | logged key | meaning | unit |
    |---|---|---|
    | ``zeroth_order/projected_gradient_rms`` | rms of ``v̄_p``, about the gradient's norm | nats per unit of θ |
    | ``zeroth_order/lr`` | learning rate of the update, first parameter group | – |

    Args:
        rule: Update rule of all parameters. Default: `SGD`.
        probes: ``P``, directions a batch.
        mu: ``μ``, smoothing length.
        estimator: ``central``, ``forward``, or an `hosfl_lightning.optim.Estimator`, also by its class path.
        distribution: Of the directions: ``rademacher`` or ``gauss16``.
        seed: Of the directions; step ``t`` of the run uses those of round ``t``.
        schedule: ``follow`` that of the module's optimizer, or stay ``constant`` at the rule's rate.

    Raises:
        ValueError: A setting out of range, what needs a gradient (clipping, accumulation, a GradScaler, an own
            ``backward``), a strategy that divides parameters, a ``training_step`` that does not repeat itself.

    Reference: MeZO, arXiv 2305.17333.
    """

    def __init__(
        self,
        rule: UpdateRule | None = None,
        probes: int = 1,
        mu: float = 1e-3,
        estimator: Estimator | str = "central",
        distribution: str = "rademacher",
        seed: int = 0,
        schedule: Policy = "follow",
    ) -> None:
        estimator = check_probe_settings(probes, mu, estimator, distribution)
        check_policy(schedule)
        SharedDirections(seed, 0, probes, distribution)  # refuses a seed out of range
        self.rule, self.schedule = rule if rule is not None else SGD(), schedule
        self.settings: dict[str, Any] = {
            "probes": probes, "mu": mu, "estimator": estimator, "distribution": distribution, "seed": seed,
        }  # fmt: skip
        self.told = {**self.settings, **told(estimator)}
        self._undo = ExitStack()
        self._optimizer: ZerothOrder | None = None
        self._restored: dict[str, Any] = {}

    # ---- setting up and leaving

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would break the method; without gradients, DDP's wrapper has nothing to do."""
        if stage != "fit":
            return
        refuse_what_would_break(trainer, pl_module)
        if isinstance(trainer.strategy, DDPStrategy):
            # Its buckets would take as much memory as the parameters.
            same_start = functools.partial(broadcast_state, pl_module)
            self._undo.enter_context(replaced(same_start, (trainer.strategy, "configure_ddp")))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the parameters from the module's optimizer, now that they are on their device, and its backward."""
        self._optimizer = self._take_over(trainer, pl_module)
        resume("ZerothOrderTraining", self._optimizer, self.rule, self._restored, self._identity)
        self._probes = SilentProbes(Growth(self._optimizer.parameters), "what is trained", "rule.lr")
        self._rates = Schedule(trainer, pl_module, self.schedule, self._restored.get("peaks", ()))
        self._restored = {}
        self._checked = False
        self._values: Tensor | None = None
        self._rms: Tensor | None = None
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._training_step(pl_module, functools.partial(original, *args, **kwargs))

        self._undo.enter_context(replaced(training_step, (pl_module, "training_step")))
        self._undo.enter_context(replaced(lambda *_, **__: None, (pl_module, "backward")))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave module and strategy as they were found."""
        self._undo.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same when the run broke off, for which Trainer calls no teardown."""
        self.teardown(trainer, pl_module, "fit")

    def _take_over(self, trainer: Trainer, pl_module: LightningModule) -> ZerothOrder:
        groups = [{"params": trainable(group)} for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not any(group["params"] for group in groups):
            raise ValueError("ZerothOrderTraining: configure_optimizers names no trainable parameter of the module; "
                             "return an optimizer of those that are to be trained")  # fmt: skip
        return ZerothOrder(groups, self.rule, module=pl_module, **self.settings)

    @property
    def optimizers(self) -> list[ZerothOrder]:
        """The one that steps, once it is made; its ``state`` is part of what the run holds."""
        return [] if self._optimizer is None else [self._optimizer]

    # ---- a step

    @torch.no_grad()
    def _training_step(self, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        """The user's step, then the projected gradients of its loss."""
        # StochasticWeightAveraging has Trainer skip backward while norm statistics settle on the average.
        if pl_module.trainer.fit_loop._skip_backward:
            return step()
        output: Any = None

        def first() -> Tensor:
            nonlocal output
            output = step()
            if output is None:
                raise _SkippedBatch
            return loss_of(output).squeeze()

        def again() -> Tensor:
            with silenced(pl_module):
                return loss_of(step()).squeeze()

        assert self._optimizer is not None
        same = SameRandomness(pl_module, self._optimizer.device)
        try:
            self._values, loss = self._measure(self._optimizer, Evaluations(same, first, again))
        except _SkippedBatch:
            return None
        loss = loss.view_as(loss_of(output))
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _measure(self, optimizer: ZerothOrder, evaluations: Evaluations) -> tuple[Tensor, Tensor]:
        if self._checked:
            return optimizer.measure(evaluations)
        measured, module = None, optimizer.module
        with suppress(UnseenProbeError):  # of which the check takes care
            measured = optimizer.measure(evaluations)
        self._check(optimizer, evaluations)
        self._checked = True
        return optimizer.measure(evaluations) if measured is None or optimizer.module is not module else measured

    def _check(self, optimizer: ZerothOrder, evaluations: Evaluations) -> None:
        loss = evaluations()
        effect = check_repeats(optimizer, evaluations, loss, "running training_step again on a batch, its loss")
        if not effect:
            warnings.warn(
                f"mu={optimizer.mu:g} does not change the loss in {loss.dtype}: raise mu, or compute it in a wider "
                "dtype",
                stacklevel=2,
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The update; what the module's optimizer does after it, without gradients, is nothing."""
        values, self._values = self._values, None
        if values is None:  # training_step skipped the batch
            return
        assert self._optimizer is not None
        refuse_other_parameters(self._optimizer, optimizer)
        # Gathered and summed in rank order, so that all ranks have the same bits.
        rows: Any = pl_module.all_gather(values)
        values = rows.view(-1, len(values)).mean(0)
        if trainer_check.waited_for(trainer, values):
            trainer_check.refuse_divergence("ZerothOrderTraining", values, self._optimizer.steps)
            self._probes.saw(values, self._optimizer.steps)
        for group, factor in zip(self._optimizer.param_groups, self._rates.factors(optimizer)):
            group["lr"] = self.rule.lr * factor
        self._optimizer.record(values)
        self._optimizer.step()
        self._rms = values.square().mean().sqrt()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step."""
        rms, self._rms = self._rms, None
        if rms is not None:
            assert self._optimizer is not None
            pl_module.log("zeroth_order/projected_gradient_rms", rms.float())
            pl_module.log("zeroth_order/lr", self._optimizer.param_groups[0]["lr"])

    # ---- checkpoints

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whether a run can go on from it."""
        check_loaded(self, trainer, checkpoint, {})

    @property
    def _identity(self) -> dict[str, Any]:
        return {"rule": type(self.rule).__name__, "schedule": self.schedule, **self.told}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Moments, and the step, which is the number of the directions."""
        if self._optimizer is None:
            return {}
        return {**self._identity, "optimizer": self._optimizer.state_dict(), "peaks": self._rates.peaks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the parameters are on their device."""
        self._restored = {"schedule": "follow", **state_dict} if state_dict else {}


class _SkippedBatch(Exception):
    """``training_step`` returned None."""


def trainable(group: dict[str, Any]) -> list[Tensor]:
    """What of a parameter group is not frozen."""
    return [p for p in group["params"] if p.requires_grad]


def refuse_other_parameters(own: torch.optim.Optimizer, users: torch.optim.Optimizer) -> None:
    """Moments and directions are of the parameters taken when training started.

    Raises:
        ValueError: The module's optimizer would train others now.
    """
    taken = {id(p) for group in own.param_groups for p in group["params"]}
    if taken != {id(p) for group in users.param_groups for p in trainable(group)}:
        raise ValueError("ZerothOrderTraining: parameters were frozen or unfrozen since training started, as by "
                         "BackboneFinetuning, and the rule trains those of the start; remove such a callback, set "
                         "requires_grad before fit, and train each phase by a fit of its own")  # fmt: skip


def broadcast_state(module: torch.nn.Module) -> None:
    """All ranks start from the parameters and buffers of the first, as DDP would have it."""
    for tensor in [*module.parameters(), *module.buffers()]:
        torch.distributed.broadcast(tensor.detach(), src=0)


def refuse_what_would_break(trainer: Trainer, pl_module: LightningModule) -> None:
    """Settings that need a gradient, or under which the method is not what it says.

    Raises:
        ValueError: Names the setting and what to use instead.
    """
    kinds = (ZerothOrderTraining, HybridOrder)
    if sum(isinstance(callback, kinds) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise ValueError("trainer.callbacks holds ZerothOrderTraining beside another of its kind or HybridOrder; a "
                         "parameter is trained by one of them, remove the others")  # fmt: skip
    if not pl_module.automatic_optimization:
        raise ValueError("ZerothOrderTraining needs automatic_optimization=True; a module that steps by itself can use "
                         "hosfl_lightning.optim.ZerothOrder directly (docs/manual_optimization.md)")  # fmt: skip
    trainer_check.refuse_what_would_break("ZerothOrderTraining", trainer, pl_module)
    trainer_check.refuse_what_needs_a_gradient(trainer, pl_module)
