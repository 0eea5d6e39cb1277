"""What one optimizer step of a plain Trainer holds at its peak, and what of it the part below a cut does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from hosfl_lightning.callbacks.drop_in.hybrid_order import HybridOrder, one_of_a_kind
from hosfl_lightning.callbacks.drop_in.zeroth_order_training import ZerothOrderTraining
from hosfl_lightning.memory import MemoryMeter, storage_bytes

ROLE = "step"


class StepMemory:
    """Meters the run's second optimizer step, with all its batches: the first one makes the optimizer's state.

    Args:
        trainer: At the start of its training.

    Attributes:
        report: Empty until the step has ended. ``static_bytes``: parameters, buffers and optimizer state.
            ``step_working_bytes``: the peak of what the step made, beside them and the batch. ``lower_working_bytes``:
            the peak of what `HybridOrder` made of it when λ had come, beside z and λ.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.report: dict[str, float] = {}
        self._order = one_of_a_kind(HybridOrder, trainer)
        self._first = trainer.global_step
        self._step, self._lower = MemoryMeter(), MemoryMeter()
        self._open = ExitStack()
        self._began: int | None = None

    def begin_batch(self, trainer: Trainer) -> None:
        """Start to meter if the first step is over."""
        if self._began is None and not self.report and trainer.global_step > self._first:
            self._began = trainer.global_step
            self._open.enter_context(self._step)
            self._open.enter_context(self._step.role(ROLE))
            if self._order is not None:
                before = self._order.working
                self._order.working = self._below
                self._open.callback(setattr, self._order, "working", before)

    def end_batch(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the report is complete with this batch."""
        if self._began is None or trainer.global_step == self._began:
            return False
        self.stop()
        self._began = None
        self.report["static_bytes"] = self._static(trainer, pl_module)
        self.report["step_working_bytes"] = self._step.peak(ROLE)
        if self._order is not None:
            self.report["lower_working_bytes"] = self._lower.peak(ROLE)
        return True

    def stop(self) -> None:
        """Meter no longer."""
        self._open.close()

    @contextmanager
    def _below(self) -> Iterator[None]:
        with self._lower, self._lower.role(ROLE):
            yield

    def _static(self, trainer: Trainer, pl_module: LightningModule) -> int:
        kinds = HybridOrder | ZerothOrderTraining
        ours = [o for c in trainer.callbacks if isinstance(c, kinds) for o in c.optimizers]  # type: ignore[attr-defined]
        optimizers = [*trainer.optimizers, *ours]
        state = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
        return storage_bytes([*pl_module.parameters(), *pl_module.buffers(), *state])
