"""FSL-SAGE: CSE-FSL whose auxiliary heads are taught the server's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from torch import Tensor

from hosfl_lightning.aggregation import AggregationRule
from hosfl_lightning.algorithms.csefsl import CSEFSL
from hosfl_lightning.callbacks.peak_memory_monitor import Rehearse
from hosfl_lightning.optim import UpdateRule
from hosfl_lightning.servers import SplitModule


class FSLSAGE(CSEFSL):
    r"""CSE-FSL, and every so often λ comes back, to which the head's own gradient at the cut is aligned.

    ::

        every align_every-th round, after the step whose z is the round's last to go up
                           λ = ∂ℓ(f_s(z; θ_s), y)/∂z comes down
                           θ_a ← θ_a − η ∇_{θ_a} ‖∇_z ℓ(f_a(z; θ_a), y) − λ‖²,   align_steps times

    λ is the gradient at the server half that z was sent to, before its step. Both gradients are of a mean over the loss
    terms, so the more terms, the smaller a step of one η. The memory that is reported is that of a round with
    alignment; arithmetic and time are the mean over ``align_every`` rounds.

    With ``local_steps < upload_every`` z does not go up in every round. It has to in those that align, as it does where
    ``upload_every`` divides ``align_every · local_steps``.

    In HERON-SFL's comparison (ResNet-18 on CIFAR-10, 5 clients) a client peaks at 726 MB and the traffic is 244 GB.

    Args:
        client_optimizer: As in `Algorithm`.
        client_scheduler: As in `Algorithm`.
        aggregation: As in `LocalTraining`.
        local_steps: As in `LocalTraining`.
        checkpointing: As in `LocalTraining`.
        upload_every: As in `AuxiliaryTraining`.
        auxiliary_blocks: As in `AuxiliaryTraining`.
        align_every: Rounds from one alignment to the next; the first is in round 0.
        align_steps: Gradient steps of an alignment.
        align_lr: ``η``.

    Raises:
        ValueError: For a setting out of range; for rounds of alignment in which no z goes up; for a model of whose head
            nothing is trained.

    Reference: FSL-SAGE, arXiv 2505.23182.
    """

    def __init__(
        self,
        client_optimizer: UpdateRule | None = None,
        client_scheduler: LRSchedulerCallable | None = None,
        aggregation: AggregationRule | None = None,
        local_steps: int = 1,
        checkpointing: bool = False,
        upload_every: int = 1,
        auxiliary_blocks: int = 0,
        align_every: int = 10,
        align_steps: int = 1,
        align_lr: float = 1e-2,
    ) -> None:
        super().__init__(
            client_optimizer, client_scheduler, aggregation, local_steps, checkpointing, upload_every, auxiliary_blocks
        )
        for name, value in (("align_every", align_every), ("align_steps", align_steps)):
            if value < 1:
                raise ValueError(f"trainer.algorithm: {name} must be >= 1, got {value}")
        if not align_lr > 0:
            raise ValueError(f"trainer.algorithm: align_lr must be > 0, got {align_lr}")
        self.align_every, self.align_steps, self.align_lr = align_every, align_steps, align_lr
        self._check_that_z_goes_up()

    def _check_that_z_goes_up(self) -> None:
        aligning = range(0, self.align_every * self.upload_every, self.align_every)  # then all begins anew
        if not all(any(self.due(round, step) for step in range(self.local_steps)) for round in aligning):
            raise ValueError(
                f"trainer.algorithm: with local_steps={self.local_steps} and upload_every={self.upload_every} no z "
                f"goes up in some of the rounds that align with align_every={self.align_every}; make align_every * "
                "local_steps a multiple of upload_every"
            )

    def check(self, module: SplitModule) -> None:
        """As in `AuxiliaryTraining`, and something of the head is trained."""
        super().check(module)
        if not self.head(module)[1]:
            raise ValueError(
                f"FSLSAGE aligns the auxiliary head, but nothing of it is trained with auxiliary_blocks="
                f"{self.auxiliary_blocks} (norm and head are frozen beside LoRA); raise trainer.algorithm's "
                "auxiliary_blocks"
            )

    def answered(self, round: int, step: int) -> bool:
        """In every ``align_every``-th round, for the last z that goes up."""
        last = step + self.upload_every >= self.local_steps
        return last and self.due(round, step) and round % self.align_every == 0

    def descend(self, batch: dict[str, Tensor], z: Tensor, loss: Tensor, answers: Sequence[Tensor]) -> None:
        """The client's step, then the alignment."""
        super().descend(batch, z, loss, answers)
        for multiplier in answers:
            self.client.align(batch, z, multiplier, self.align_steps, self.align_lr)

    def rehearsals(self) -> list[tuple[Rehearse, float]]:
        """One round in ``align_every`` aligns."""
        if self.align_every == 1:
            return super().rehearsals()
        share = 1 / self.align_every
        return [(self.rehearse, share), (partial(self.rehearse, round=1), 1 - share)]

    def settings(self) -> dict[str, Any]:
        """As in `AuxiliaryTraining`, and the alignment's."""
        names = ("align_every", "align_steps", "align_lr")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}
