"""Settings of a plain Trainer and of its module under which probes are not what they say."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

#: Subclasses of those that keep parameters whole, which divide them or run a step later than it is written.
OTHER_STRATEGIES = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


def refuse_no_rounds(name: str, trainer: Any) -> None:
    """A callback that works on an Orchestrator's rounds.

    Args:
        name: Of the callback.
        trainer: Orchestrator or plain Trainer.

    Raises:
        ValueError: It has no rounds.
    """
    if not hasattr(trainer, "processes"):
        raise ValueError(f"{name} works on the rounds of an Orchestrator; remove it from this Trainer")


def refuse_what_would_break(name: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Before anything runs.

    Args:
        name: Of the callback that probes.
        trainer: Its strategy is looked at.
        pl_module: Its training_step is to run again on a batch.

    Raises:
        ValueError: Names the setting and what to use instead.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, OTHER_STRATEGIES):
        raise ValueError(f"trainer.strategy={type(strategy).__name__}: {name} probes whole parameters in eager steps; "
                         "use a single device or ddp")  # fmt: skip
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(f"{name}: a training_step that takes dataloader_iter cannot run a batch twice; take (batch, "
                         "batch_idx)")  # fmt: skip
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        raise ValueError(f"{name}: a compiled LightningModule runs no hooks, by which probes work; give the Trainer "
                         "the module itself (HybridOrder: what is above the cut may be compiled, each module by its "
                         "own module.compile(), docs/drop_in.md)")  # fmt: skip


def refuse_what_needs_a_gradient(trainer: Trainer, pl_module: LightningModule) -> None:
    """Settings that would have no effect where no gradient is.

    Raises:
        ValueError: Names the setting and what to use instead.
    """
    if trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module):
        raise ValueError("trainer.gradient_clip_val and configure_gradient_clipping have no gradient to clip under "
                         "ZerothOrderTraining; remove them and lower the rule's lr")  # fmt: skip
    schedules = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches > 1 or any(c.going_to_accumulate_grad_batches() for c in schedules):
        raise ValueError("trainer.accumulate_grad_batches has no gradient to accumulate under ZerothOrderTraining; use "
                         "a larger batch, or more probes")  # fmt: skip
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(f"trainer.precision={trainer.precision}: a GradScaler has no gradient to scale under "
                         "ZerothOrderTraining; use bf16-mixed or 32-true")  # fmt: skip
    if is_overridden("backward", pl_module):
        raise ValueError(f"{type(pl_module).__name__} overrides backward, which ZerothOrderTraining never calls; "
                         "remove it")  # fmt: skip


def refuse_several_optimizers(trainer: Trainer) -> None:
    """Once they are configured.

    Raises:
        ValueError: There is not exactly one.
    """
    if not trainer.optimizers:
        raise ValueError("HybridOrder: configure_optimizers gives no optimizer; return one of the part above the cut")
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"HybridOrder: configure_optimizers gives {len(trainer.optimizers)} optimizers (as a GAN does), and the "
            "lower part steps with exactly one; train such a module with hosfl_lightning.optim.ZerothOrder in its own "
            "training_step"
        )


def refuse_nothing_above(optimizer: Optimizer, cut: str) -> None:
    """Once θ_c asks for no gradient.

    Raises:
        ValueError: The module's optimizer holds nothing that does.
    """
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"HybridOrder: configure_optimizers names nothing that is trained at {cut!r} or after it; "
                         "give the optimizer the parameters above the cut, or take ZerothOrderTraining")  # fmt: skip


def refuse_a_second_backward(pl_module: LightningModule) -> None:
    """In one batch.

    Raises:
        ValueError: Always; says what may have asked for it.
    """
    if pl_module.automatic_optimization:
        raise ValueError("HybridOrder: the optimizer evaluates its closure more than once a step (LBFGS does); use one "
                         "that needs a single gradient")  # fmt: skip
    raise ValueError("HybridOrder: training_step calls manual_backward more than once, so that the cut has no single "
                     "λ; add up the losses and call it once")  # fmt: skip


def refuse_an_unheard_backward() -> None:
    """In manual optimization.

    Raises:
        ValueError: Always.
    """
    raise ValueError("HybridOrder: the optimizer stepped without self.manual_backward(loss), so the gradient at the "
                     "cut was never read; call it in place of loss.backward()")  # fmt: skip


def refuse_divergence(name: str, answers: Tensor, step: int) -> None:
    """What the ranks answered is to be applied.

    Raises:
        ValueError: Some of it is not finite.
    """
    if not answers.isfinite().all():
        cut = name == "HybridOrder"
        what, also = ("or its gradient at the cut ", " or the optimizer's learning rate") if cut else ("", "")
        raise ValueError(f"{name}: at step {step} the loss {what}is not finite; lower rule.lr{also}")


def waited_for(trainer: Trainer, tensor: Tensor) -> bool:
    """Whether the host may look at it: it is there, or this is a step whose figures the Trainer logs."""
    every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
    return tensor.device.type == "cpu" or not trainer.global_step % every
