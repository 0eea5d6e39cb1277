"""FSL-SAGE: CSE-FSL whose auxiliary heads are taught the server's gradient."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from hosfl_lightning.algorithms.csefsl import CSEFSL
from hosfl_lightning.models import SplitModule


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
        align_every: Rounds from one alignment to the next; the first is in round 0.
        align_steps: Gradient steps of an alignment.
        align_lr: ``η``.

    Raises:
        ValueError: For a setting out of range; for rounds of alignment in which no z goes up; for a model of whose head
            nothing is trained.

    Reference: FSL-SAGE, arXiv 2505.23182.
    """

    def __init__(
        self, *args: Any, align_every: int = 10, align_steps: int = 1, align_lr: float = 1e-2, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
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

    @override
    def check(self, module: SplitModule) -> None:
        """Something of the head is trained."""
        super().check(module)
        if not any(name.startswith("auxiliary.") for name in self.parameters(module)):
            raise ValueError(
                f"FSLSAGE aligns the auxiliary head, but nothing of it is trained with auxiliary_blocks="
                f"{self.auxiliary_blocks} (norm and head are frozen beside LoRA); raise trainer.algorithm's "
                "auxiliary_blocks"
            )

    @override
    def replied(self, round: int, step: int) -> bool:
        """In every ``align_every``-th round, for the last z that goes up."""
        last = step + self.upload_every >= self.local_steps
        return last and self.due(round, step) and round % self.align_every == 0

    @override
    def client_settings(self) -> dict[str, Any]:
        return {**super().client_settings(), "align_steps": self.align_steps, "align_lr": self.align_lr}

    @override
    def kinds_of_round(self) -> list[tuple[int, float]]:
        """One round in ``align_every`` aligns."""
        share = 1 / self.align_every
        return [(0, share), (1, 1 - share)] if self.align_every > 1 else super().kinds_of_round()

    @override
    def settings(self) -> dict[str, Any]:
        """The alignment's as well."""
        names = ("align_every", "align_steps", "align_lr")
        return {**super().settings(), **{name: getattr(self, name) for name in names}}
